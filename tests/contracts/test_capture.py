"""A step of training never waits for the device, so that a GPU can record it: every part under every kind of line."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tests.contracts.test_learned import LINES, REFUSED, tensor
from tests.tiny import tiny_model
from tests.waiting import NeverWaits, WaitError
from torch import Tensor

import nybble
from nybble.learned import ACTIVATIONS, REGISTRY, WEIGHTS, Learned, make_part
from nybble.learned.transforms import REGISTRY as TRANSFORMS
from nybble.quantizer import Quantizer
from nybble.reconstruction import gradients

#: Beside those of LINES: scales that are searched as they will be stored, and around a mean.
MORE: dict[str, tuple[str, ...]] = {
    WEIGHTS: (
        "nvfp4-search",
        "nvfp4-46",
        "nvfp4-ct",
        "fp4-m2",
        "nf4 flat=64 scale_format=(dynamic8 flat=8 center=mean)",
    ),
    ACTIVATIONS: ("nvfp4-search", "nvfp4-46", "mxfp4-ct"),
}
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {"ste": ({}, {"through": True})}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (name, side, options)
        for name, part in REGISTRY.all().items()
        for side in part.sides
        if not set(LINES[side]) <= REFUSED[name].get(side, set())  # of code books: tests/methods/test_vq4dit.py
        for options in OPTIONS.get(name, ({},))
    ]


def step(learned: Learned, x: Tensor, t: Tensor) -> None:
    for parameter in learned.parameters():
        parameter.grad = None
    ((learned(x) - x.detach() * 0.9).square().mean() + learned.penalty(t)).backward()


@pytest.mark.parametrize(("name", "side", "options"), cases())
def test_a_part_never_waits(name: str, side: str, options: dict[str, Any]) -> None:
    part, refused, tried = make_part(name, options), REFUSED[name].get(side, set()), 0
    for line in (*LINES[side], *MORE[side]):
        try:
            part.check(Quantizer(line), side)
        except nybble.NybbleError:
            assert line in refused or line in MORE[side]
            continue
        x, t = tensor(side), torch.tensor(0.3)
        learned = part.make(Quantizer(line), x, side=side).train()
        x.requires_grad_()
        with NeverWaits(warm=True):
            step(learned, x, t)
        try:
            with NeverWaits():
                step(learned, x, t)
        except WaitError as error:
            pytest.fail(f"{name} under {line}: {error}")
        tried += 1
    assert tried >= len([line for line in LINES[side] if line not in refused]) > 0


@pytest.mark.parametrize("weights", ["int4 group=16 symmetric=false", "nvfp4-search"])
@pytest.mark.parametrize("block", [None, *TRANSFORMS.names()])
def test_a_step_of_the_engine_never_waits(block: str | None, weights: str) -> None:
    """Forward of the window, loss, penalties, gradients, their signs: what the engine records."""
    ran, steps = gradients.Gradients._run, 0

    def run(self: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        for warm in (True, False):
            with NeverWaits(warm=warm):
                found = ran(self, *args)
        return found

    by_length = {"weights": "ste", "optimizer": "adam", "max_norm": 1.0}
    options = {**(by_length if block else {"weights": "sign-round", "optimizer": "sign"}), "block": block, "steps": 2}
    found = {"reconstruction": "mse", **{key: value for key, value in options.items() if value is not None}}
    recipe = {
        "scheme": {"weights": weights, "inputs": "nvfp4-search"},
        "steps": [{"solver": "rtn"}, found],
    }
    data = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    with mock.patch.object(gradients.Gradients, "_run", run):
        model = tiny_model("llama", torch.float32, num_hidden_layers=1)
        nybble.quantize(model, recipe, data, settings={"batch": 2, "seq_len": 8})
    assert steps == 2


def test_what_waits_is_found() -> None:
    x = torch.arange(4.0)
    for waits in (lambda: float(x.sum()), lambda: x[x > 1], lambda: torch.tensor(1.0), lambda: torch.equal(x, x)):
        with pytest.raises(WaitError), NeverWaits():
            waits()
