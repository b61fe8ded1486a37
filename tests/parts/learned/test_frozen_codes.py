"""Frozen codes: gradients by hand, codes that stay, and what they come to: the least-squares scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import logits, save_text, save_tiny, tiny_model
from torch import Tensor, nn

import nybble
from nybble.learned import make_part
from nybble.learned.frozen_codes import Frozen
from nybble.nn.packed import Packed
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.reconstruction import engine
from nybble.reconstruction.norms import norms_of

OFFSET = "int2_full group=16 scale=minmax(offset=true) scale_format=float32 offset_format=float32"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def learned(line: str, x: Tensor, start: Any = None) -> Frozen:
    found = make_part("frozen-codes", {}).make(Quantizer(line), x, start)
    assert isinstance(found, Frozen)
    return found.train()


def test_gradients_by_hand() -> None:
    """dw_hat/ds = v, dw_hat/do = 1: sums over a block; the weight gets none, whatever it is."""
    x, upstream = torch.randn(4, 32), torch.randn(4, 32)
    part, other = learned(OFFSET, x), torch.randn(4, 32, requires_grad=True)
    found = part(other)
    (found * upstream).sum().backward()
    packed = Quantizer(OFFSET).quantize(x)
    assert torch.equal(found, packed.dequantize()) and other.grad is None
    values = packed.unpacked().view(8, 16).double()
    values = torch.where(values > 1, values - 4, values)
    scale, offset = part.held.get_parameter("scale"), part.held.get_parameter("offset")
    assert scale.grad is not None and offset.grad is not None
    out = upstream.double().view(8, 16)
    torch.testing.assert_close(scale.grad.double().flatten(), (values * out).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(offset.grad.double().flatten(), out.sum(1), rtol=1e-5, atol=1e-5)


LINES = (
    OFFSET, "int2 group=16 symmetric=false", "int4-ct group=16", "nvfp4", "mxfp4", "nf4 flat=40",
    "float8_e4m3fn channel",
    "nf4-bnb-dq", "int3 group=24 pad=true", "float4_e2m1fn block=2x16", "int3 group=16 scale=pow2", "int8 tensor",
    "fp4-bnb", "ternary channel scale=mean",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_solvers_codes_stay_bit_for_bit(line: str) -> None:
    """Codes that are not the nearest ones: given the dequantized weight, they are found again, and kept by training."""
    generator = torch.Generator().manual_seed(0)
    x, quantizer = torch.randn(8, 64, generator=generator) + 0.1, Quantizer(line)
    nearest = quantizer.quantize(x)
    codes = quantizer.quantize(x + 0.3 * torch.randn(8, 64, generator=generator), nearest.params).unpacked()
    solved = quantizer.pack(codes, quantizer.soften(nearest.params))
    part = learned(line, solved.dequantize(), solved)
    assert torch.equal(part.eval().settle(x).dequantize(), solved.dequantize())
    optimizer = torch.optim.Adam(part.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (part.train()(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()
    found = part.eval().settle(x)
    assert isinstance(found, BlockQTensor)
    same = found.unpacked() == solved.unpacked()
    assert bool((same | (found.dequantize() == 0) & (solved.dequantize() == 0)).all())  # -0 is 0
    assert not torch.equal(found.dequantize(), solved.dequantize())
    assert bool(torch.isfinite(found.dequantize()).all()) and found.spec() == solved.spec()
    if "pow2" in line:
        assert isinstance(found.params.scale, Tensor)
        assert torch.equal(found.params.scale.log2(), found.params.scale.log2().round())


def test_training_comes_to_numpys_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x, inputs = torch.randn(6, 32, generator=generator), torch.randn(200, 32, generator=generator)
    part = learned(OFFSET, x)
    values = part.quantizer.granularity.to_blocks(part.codes.double())
    values = torch.where(values > 1, values - 4, values).view(6, 2, 16)
    optimizer = torch.optim.LBFGS(part.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (inputs @ (part(x) - x).T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    for row in range(6):
        split = inputs.double().view(200, 2, 16)
        design = torch.cat([(split * values[row]).sum(2), split.sum(2)], 1).numpy()
        best = np.linalg.lstsq(design, (inputs @ x[row]).double().numpy(), rcond=None)[0]
        ours = torch.cat([part.held.get_parameter(name)[row].flatten() for name in ("scale", "offset")])
        np.testing.assert_allclose(ours.detach().double().numpy(), best, rtol=5e-3, atol=5e-3)


# ---------------------------------------------------------------------------------------- as a recipe's last step
def run(model: Any, *steps: dict[str, Any], targets: str = "re:.*_proj", **settings: Any) -> tuple[Any, Any]:
    scheme = {"targets": [targets], "weights": "int2 group=16 symmetric=false"}
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": list(steps)})
    tokens = torch.randint(3, 300, (16, 16), generator=torch.Generator().manual_seed(0))
    given = nybble.Settings(samples=16, seq_len=16, batch=4, dtype=torch.float32, **settings)
    found: tuple[Any, Any] = nybble.quantize(model, recipe, tokens, settings=given)
    return found


SOLVER = {"solver": "decoupleq", "rounds": 2, "sweeps": 1}
STAGE_TWO = {
    "reconstruction": "mse", "weights": "frozen-codes", "norms": True, "steps": 30,
    "rates": {"scales": 2e-3, "norms": 2e-3},
}  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, BlockQTensor]:
    found = {n: m.weight.qtensor() for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Packed)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, BlockQTensor)}


def test_stage_two_lowers_the_error_and_keeps_every_code(tmp_path: Path) -> None:
    """Of the first block, whose inputs are the same; norms learn beside; the file gives the same model."""
    plain, _ = run(tiny_model(dtype=torch.float32), SOLVER)
    model, report = run(tiny_model(dtype=torch.float32), SOLVER, STAGE_TWO)
    without, other = run(tiny_model(dtype=torch.float32), SOLVER, {k: v for k, v in STAGE_TWO.items() if k != "norms"}
                         | {"rates": {"scales": 2e-3}})  # fmt: skip
    codes = [weights_of(m) for m in (plain, model)]
    first = [name for name in codes[0] if ".layers.0." in name]
    assert len(first) == 7 and codes[0].keys() == codes[1].keys()
    for name in first:
        assert torch.equal(codes[0][name].codes, codes[1][name].codes)
        assert not torch.equal(codes[0][name].params.scale, codes[1][name].params.scale)  # type: ignore[arg-type]
        assert not torch.equal(codes[0][name].params.offset, codes[1][name].params.offset)  # type: ignore[arg-type]
    entries = [[row.learned["windows"][0] for row in r.layers if row.learned] for r in (report, other)]
    assert all(entry["after"] < 0.97 * entry["before"] for found in entries for entry in found)
    assert entries[0][0]["norms"] == 2 and "norms" not in entries[1][0]
    assert entries[0][0]["after"] < entries[1][0]["after"]
    reference = tiny_model(dtype=torch.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        was, now, kept = (m.get_submodule(f"model.layers.0.{name}") for m in (reference, model, without))
        assert type(now) is type(was) and now.weight.dtype == was.weight.dtype
        assert not torch.equal(now.weight, was.weight) and torch.equal(kept.weight, was.weight)
    assert not any("Norm" in name and "Learned" in name for name in {type(m).__name__ for m in model.modules()})
    loaded, _ = nybble.load(nybble.save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(model))


def test_norms_of_the_float_network_stay() -> None:
    """What the second block should give is the float network's, whatever the first one's norms learned."""
    from nybble.reconstruction import engine, targets

    seen: list[Tensor] = []
    wanted_of = targets.wanted_of

    def watch(window: Any, names: Any) -> Any:
        _, given = next(iter(window.inputs("float")))
        seen.append(given["hidden_states"] if "hidden_states" in given else next(iter(given.values())))
        return wanted_of(window, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "wanted_of", watch)
        run(tiny_model(dtype=torch.float32), SOLVER, STAGE_TWO)
    tokens = torch.randint(3, 300, (16, 16), generator=torch.Generator().manual_seed(0))[:4]
    with torch.no_grad():
        states = tiny_model(dtype=torch.float32)(tokens, output_hidden_states=True).hidden_states
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], states[1], rtol=1e-5, atol=1e-5)


def test_windows_that_overlap_and_what_goes_back() -> None:
    """A norm goes on from what it learned; a window that gets worse leaves norms as they were."""
    _, report = run(
        tiny_model(dtype=torch.float32, num_hidden_layers=3), SOLVER, {**STAGE_TWO, "window": 2, "overlap": 1}
    )
    windows = [row.learned["windows"] for row in report.layers if row.learned and ".1." in row.name]
    assert all(len(found) == 2 for found in windows)
    worse = {**STAGE_TWO, "rates": {"scales": 0.0, "norms": 3.0}, "steps": 3}
    model, report = run(tiny_model(dtype=torch.float32), SOLVER, worse)
    assert all(row.learned["windows"][0]["kept"] == "start" for row in report.layers if row.learned)
    reference = tiny_model(dtype=torch.float32).state_dict()
    norms = {name: t for name, t in model.state_dict().items() if "layernorm" in name}
    assert len(norms) == 4 and all(torch.equal(t, reference[name]) for name, t in norms.items())


def test_norms_go_back_to_what_the_window_before_left() -> None:
    """Of two windows that overlap, the second makes the block that both have worse: its norms are the first one's."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=3)
    step = {**STAGE_TWO, "steps": 4, "window": 2, "overlap": 1}
    seen: list[tuple[bool, list[Tensor], list[Tensor]]] = []
    real = engine.reconstruct

    def watch(window: Any, options: Any) -> Any:
        def norms() -> list[Tensor]:
            return [
                p.detach().clone() for state in window.blocks for n in norms_of(state).values() for p in n.parameters()
            ]

        before = norms()
        if before:  # what the window before it left
            options = replace(options, rates={"scales": 0.0, "norms": 3.0})
        found = real(window, options)
        seen.append((found.kept, before, norms()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.reconstruction.in_units.reconstruct", watch)
        run(model, SOLVER, step)
    (first, none, _), (second, before, after) = seen
    assert first and not none and not second and len(before) == 2
    assert all(torch.equal(one, other) for one, other in zip(before, after[: len(before)], strict=True))
    assert not all(bool((t == t.round()).all()) for t in before)  # they had learned


def test_biases_learn_where_there_are_some() -> None:
    step = {**STAGE_TWO, "norms": False, "biases": True, "rates": {"scales": 0.0, "biases": 1e-3}}
    model, _ = run(tiny_model(dtype=torch.float32), {"solver": "rtn"}, step)
    reference = tiny_model(dtype=torch.float32)
    was, now = (m.get_submodule("model.layers.0.self_attn.q_proj").bias for m in (reference, model))
    assert now.dtype == was.dtype and not torch.equal(was, now)


@pytest.mark.parametrize("line", ["nvfp4", "int3 channel"])
def test_after_any_solver(tmp_path: Path, line: str) -> None:
    """Scales alone; codes are GPTQ's."""
    folder, text = save_tiny(tmp_path / "float", num_hidden_layers=1), save_text(tmp_path / "text.txt")
    settings = nybble.Settings(samples=4, seq_len=16, batch=4, dtype=torch.float32)
    step = {"reconstruction": "mse", "weights": "frozen-codes", "steps": 20, "rates": {"scales": 5e-3}}
    found = []
    for steps in ([{"solver": "gptq"}], [{"solver": "gptq"}, step]):
        recipe = parse_recipe({"name": "x", "scheme": {"weights": line}, "steps": steps})
        found.append(weights_of(nybble.quantize(str(folder), recipe, str(text), settings=settings)[0]))
    same = [torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0]]
    moved = [not torch.equal(found[0][n].dequantize(), found[1][n].dequantize()) for n in found[0]]
    assert len(same) == 7 and all(same) and any(moved)


def test_norms_of_blocks_that_stay_in_float_stay_too() -> None:
    model, _ = run(tiny_model(dtype=torch.float32), {"solver": "rtn"}, STAGE_TWO, targets="re:.*layers.0.*_proj")
    reference = tiny_model(dtype=torch.float32)
    for block, same in ((0, False), (1, True)):
        was, now = (m.get_submodule(f"model.layers.{block}.input_layernorm").weight for m in (reference, model))
        assert torch.equal(was, now) == same
