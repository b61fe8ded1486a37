from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nybble.core.seeds import derive_seed, generator, preserve_global_rng


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    # sha256('[0]') and sha256('[7, "model.layers.0", "rounding"]'), first 8 bytes, computed with sha256sum.
    assert derive_seed(0) == int.from_bytes(bytes.fromhex("d0bca111f8628137"), "little") >> 1
    assert (
        derive_seed(7, "model.layers.0", "rounding") == int.from_bytes(bytes.fromhex("550a568d11cbf282"), "little") >> 1
    )


def test_each_use_has_its_own_stream() -> None:
    uses = [(0,), (1,), (0, "a"), (0, "a", "b"), (0, "ab"), (0, "b", "a"), (-1,), (0, "")]
    assert len({derive_seed(*use) for use in uses}) == len(uses)  # type: ignore[arg-type]


def test_a_generator_repeats_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first = torch.rand(8, generator=generator(3, "x"))
    assert torch.equal(first, torch.rand(8, generator=generator(3, "x")))
    assert not torch.equal(first, torch.rand(8, generator=generator(4, "x")))
    assert torch.equal(before, torch.get_rng_state())


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_global_state_is_put_back_also_after_an_error(fails: bool) -> None:
    with preserve_global_rng():
        expected = _draw()
    try:
        with preserve_global_rng():
            random.seed(5)
            np.random.seed(5)
            torch.manual_seed(5)
            assert _draw() != expected
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert _draw() == expected


def test_a_broken_device_does_not_hide_what_broke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed kernel the device's random state can't be put back: the first error is what is seen."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)

    def refuse(states: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "set_rng_state_all", refuse)
    with pytest.raises(ZeroDivisionError), preserve_global_rng():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="illegal"), preserve_global_rng():
        pass
