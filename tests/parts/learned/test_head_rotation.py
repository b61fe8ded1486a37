"""Rotations inside the heads that a window learns: folded exactly, orthogonal, and of use where values are loud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, tiny_model
from torch import Tensor, nn

import nybble
from nybble.calibration.block import BlockState
from nybble.calibration.folds import places_of
from nybble.core.errors import SchemeError
from nybble.core.stiefel import orthogonality_error
from nybble.learned.transforms import Moving, Place, make_learned_transform
from nybble.models.adapter import adapter_for
from nybble.recipe import parse_recipe
from nybble.reconstruction import transforming

SCHEME = {"targets": ["re:.*(v_proj|o_proj)"], "weights": "int4 channel", "inputs": "int4 token"}
LEARN: dict[str, Any] = {
    "reconstruction": "mse", "block": "head-rotation", "steps": 40, "rates": {"rotation": 0.02}, "keep": "best",
    "every": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens(seed: int) -> Tensor:
    return torch.randint(3, 300, (32, 16), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def planted(family: str = "llama") -> Any:
    """A model one of whose values a head is loud."""
    model = tiny_model(family, torch.float32)
    if family == "llama":
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[[2, 11]] *= 8
            layer.self_attn.o_proj.weight[:, [2, 10, 19, 27]] /= 8
    return model


def quantized(*steps: dict[str, Any], scheme: dict[str, Any] | None = None) -> tuple[Any, Any]:
    recipe = parse_recipe({"name": "x", "scheme": scheme or SCHEME, "steps": list(steps)})
    settings = nybble.Settings(samples=32, seq_len=16, batch=8, dtype=torch.float32)
    return nybble.quantize(planted(), recipe, tokens(0), settings=settings)


@torch.no_grad()
def away(model: nn.Module) -> float:
    """From the float model, on tokens that calibration has not seen."""
    one, other = (m(tokens(1), use_cache=False).logits for m in (planted(), model))
    return float((one - other).square().mean() / one.square().mean())


def place(family: str) -> tuple[BlockState, Place]:
    model = planted(family)
    adapter = adapter_for(model)
    state = BlockState(adapter.blocks_of(model)[0], adapter.block_names(model)[0])
    (found,) = (
        p for p, _ in places_of(state, adapter, model.config) if make_learned_transform("head-rotation", {}).takes(p)
    )
    return state, found


def begun(found: Place, **options: Any) -> Moving:
    moving = make_learned_transform("head-rotation", options).begin([found], [None])
    with torch.no_grad():
        for number, parameter in enumerate(moving.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return moving


@pytest.mark.parametrize("options", [{}, {"block": 4}, {"start": "identity"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "bloom", "mixtral"])
@torch.no_grad()
def test_the_float_block_stays_the_same(family: str, options: dict[str, Any]) -> None:
    """Fused projections and shared values too; what the output layer reads is the turned values."""
    model = planted(family)
    before, adapter = logits(model), adapter_for(model)
    for name in adapter.block_names(model):
        state = BlockState(model.get_submodule(name), name)
        pairs = places_of(state, adapter, model.config)
        (found,) = (p for p, _ in pairs if p.heads is not None)
        moving = begun(found, **options)
        assert orthogonality_error(moving.parameters_of(0)["rotation"]) < 1e-5
        new = moving.rewritten({key: state.get(key) for key in found.weights})
        assert len(new) >= 2 and not any(
            torch.equal(value, state.get(key)) for key, value in new.items() if value.ndim > 1
        )
        for key, value in new.items():
            state.put(key, value)
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
        rotation = moving.parameters_of(0)["rotation"]
        turned = moving.inputs(found.readers[0], x)
        assert turned.shape == x.shape and torch.equal(moving.inputs("other", x), x)
        heads = x.view(3, 5, 4, 8)
        shared = len(rotation) < 4
        by_hand = torch.einsum("bthw,hvw->bthv", heads, rotation.repeat_interleave(2, 0) if shared else rotation)
        torch.testing.assert_close(turned, by_hand.reshape(x.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5 * float(before.std()))


def test_gradients_reach_it_and_a_state_dict_is_all() -> None:
    state, found = place("llama")
    moving = make_learned_transform("head-rotation", {}).begin([found], None)
    (parameters,) = moving.groups().values()
    new = moving.rewritten({key: state.get(key) for key in found.weights})
    torch.stack([(value**4).sum() for value in new.values()]).sum().backward()  # type: ignore[no-untyped-call]
    assert len(parameters) == 1 and all(p.grad is not None and bool(p.grad.any()) for p in parameters)
    moved, again = begun(found), begun(found)
    again.load_state_dict(moved.state_dict())
    assert torch.equal(moved.parameters_of(0)["rotation"], again.parameters_of(0)["rotation"])
    assert not torch.equal(moved.parameters_of(0)["rotation"], moving.parameters_of(0)["rotation"])


def test_better_than_the_fixed_rotation_where_values_are_loud(tmp_path: Path) -> None:
    """On tokens that nothing has seen; beside another part, behind a rotation; the file gives the same model."""
    nearest, _ = quantized({"solver": "rtn"})
    fixed, _ = quantized({"transform": "hadamard", "signs": False}, {"solver": "rtn"})
    seen: list[float] = []
    settle = transforming.Transformed.settle

    def watch(self: Any) -> None:
        seen.append(max(orthogonality_error(self.moving.parameters_of(0)["rotation"]), 0.0))
        settle(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforming.Transformed, "settle", watch)
        model, report = quantized({"solver": "rtn"}, LEARN)
    assert len(seen) == 2 and max(seen) < 1e-5
    assert away(model) < 0.95 * away(fixed) < 0.95 * away(nearest)
    said = " ".join(note for row in report.layers for note in row.notes)
    assert "self_attn.v_proj -> self_attn.o_proj rotated inside 2 heads" in said
    loaded, _ = nybble.load(nybble.save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(model))


def test_beside_other_parts_and_behind_any_solver() -> None:
    both = {**LEARN, "weights": "sign-round", "optimizer": "sign", "steps": 8,
            "rates": {"rotation": 2e-3, "rounding": 5e-3, "clip": 5e-3}}  # fmt: skip
    behind = {**LEARN, "block": {"head-rotation": {"start": "identity", "block": 4}}, "steps": 8}
    found = [
        quantized({"solver": "gptq"}, both)[0],
        quantized({"transform": "hadamard"}, {"solver": "gptq"}, behind)[0],
    ]
    plain = away(quantized({"solver": "rtn"})[0])
    assert all(away(model) < plain for model in found)
    static = {**SCHEME, "inputs": "int8 tensor static"}
    assert away(quantized({"solver": "rtn"}, {**LEARN, "steps": 8}, scheme=static)[0]) < plain


def test_refusals() -> None:
    with pytest.raises(
        SchemeError, match="head-rotation: block=3 does not divide the 8 channels of a head; the nearest that do: 2, 4"
    ):
        quantized({"solver": "rtn"}, {**LEARN, "block": {"head-rotation": {"block": 3}}})
    with pytest.raises(SchemeError, match="block=-1"):
        make_learned_transform("head-rotation", {"block": -1})
    recipe = parse_recipe({"name": "x", "scheme": SCHEME, "steps": [{"solver": "rtn"}, LEARN]})
    recipe = recipe.with_scheme(parse_recipe({"name": "x", "scheme": {"weights": "int4 channel"}, "steps": []}).scheme)
    with pytest.raises(SchemeError, match="learns a transform alone, and finds no"):
        nybble.preflight(tiny_model("falcon", torch.float32), recipe, tokens(0))
