"""Scales with the codes fixed: the least-squares solution by brute force, and never worse as stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, save_text, save_tiny
from torch import Tensor

import nybble
from nybble.calibration.error import Drift, relative_error
from nybble.core.errors import SchemeError
from nybble.corrections import refine_scales
from nybble.corrections.refine_scales import RefineScales, movable, refined
from nybble.qtensor import QuantParams, dense
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe
from nybble.solvers import Stats, Weight
from nybble.solvers.gptq import Gptq

ROWS, COLUMNS = 12, 48
LINES = (
    "int3 group=16", "int4 group=16 symmetric=false", "nvfp4", "mxfp4 group=16", "int3 channel", "int4 tensor",
    "nf4 flat=40 scale_format=(dynamic8 flat=8 center=mean)", "float4_e2m1fn block=4x16", "int4 group=20 pad=true",
    "float3_e2m0_finite group=16 scale=minmax(offset=true)", "binary group=16", "fp4-bnb", "nvfp4-ct",
    "int3 group=16 scale=pow2 rounding=half-away", "nf4 group=16 center=mean",
)  # fmt: skip


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def moment(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, COLUMNS, generator=generator)
    x = x @ (torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator))
    x[:, ::7] *= 4
    return x.T @ x / 300


@pytest.mark.parametrize("line", LINES)
def test_never_worse_as_stored_and_codes_stay(line: str) -> None:
    w, second, quantizer = matrix(), moment(), Quantizer(line)
    base = quantizer.quantize(w)
    assert movable(base, quantizer)
    found = refined(w, base, quantizer, second, 4)
    before, after = (relative_error(w, x.dequantize(), second) for x in (base, found))
    assert after < before or line == "mxfp4 group=16"
    assert torch.equal(found.codes, base.codes) and found.spec() == base.spec()
    if "pow2" in line:
        assert isinstance(found.params.scale, Tensor)
        assert torch.equal(found.params.scale.log2(), found.params.scale.log2().round())
    for sweeps in (1, 2):
        assert relative_error(w, refined(w, base, quantizer, second, sweeps).dequantize(), second) >= after * 0.9999


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("line", ["int3 group=16", "int3 channel", "int3 block=4x16", "int4 tensor", "nf4 flat=40"])
def test_it_comes_to_the_least_squares_scales(line: str, drifts: bool) -> None:
    """Each block's values times the root of H are a column; the scales that fit W best, by torch's least squares."""
    w, second = matrix(), moment()
    shift = 0.1 * torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(3))
    # inputs that the float network has (1 + shift) times as large: its outputs are those of another weight
    drift = Drift(power=shift @ second @ shift.T, cross=shift @ second) if drifts else None
    aim = w + w @ shift if drifts else w
    quantizer = Quantizer(line).replace(scale_format="float32")
    base = quantizer.quantize(w)
    root = torch.linalg.cholesky(second.double())
    view, shape = base.granularity, tuple(w.shape)
    scale = dense(base.params.scale)  # type: ignore[arg-type]
    values = base.dequantize().double() / view.expand(scale, shape).double()
    columns = []
    for number in range(scale.numel()):
        only = (torch.arange(scale.numel()) == number).double().reshape(scale.shape)
        columns.append(((values * view.expand(only, shape)) @ root).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, 1), (aim.double() @ root).flatten()).solution
    found = refined(w, base, quantizer, second, 200, drift)
    torch.testing.assert_close(dense(found.params.scale).flatten().double(), best, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]


def test_later_scales_make_up_for_coarse_ones() -> None:
    """Scales of 3 bits of mantissa: below the least-squares scales each rounded by itself."""
    w, second, quantizer = matrix(), moment(), Quantizer("nvfp4")
    base = quantizer.quantize(w)
    raw, plain = quantizer.soften(base.params), quantizer.replace(scale_format="float32")
    assert isinstance(raw.scale, Tensor)
    fine = plain.pack(base.unpacked(), QuantParams(raw.scale))
    exact = refined(w, fine, plain, second, 100).params.scale
    assert isinstance(exact, Tensor)
    rounded = quantizer.pack(base.unpacked(), replace(raw, scale=exact))
    found = refined(w, base, quantizer, second, 8)
    assert relative_error(w, found.dequantize(), second) < 0.99 * relative_error(w, rounded.dequantize(), second)


def test_groups_of_rows_have_moments_of_their_own() -> None:
    w, moments, quantizer = matrix(), torch.stack([moment(1), moment(2)]), Quantizer("int3 channel")
    base = quantizer.quantize(w)
    together = dense(refined(w, base, quantizer, moments, 4).params.scale)  # type: ignore[arg-type]
    for number, rows in enumerate((slice(0, 6), slice(6, 12))):
        part = quantizer.quantize(w[rows])
        alone = dense(refined(w[rows], part, quantizer, moments[number], 4).params.scale)  # type: ignore[arg-type]
        torch.testing.assert_close(together[rows], alone, rtol=1e-3, atol=0)


def test_it_helps_gptq() -> None:
    w, second, quantizer = matrix(), moment(), Quantizer("int3 group=16")
    solver = Gptq(clip=False)
    base = solver.solve([Weight(name="w", matrix=w, quantizer=quantizer)], Stats(second_moment=second))[0].weight
    assert isinstance(base, BlockQTensor)
    errors = [relative_error(w, x.dequantize(), second) for x in (base, refined(w, base, quantizer, second, 4))]
    assert errors[1] < 0.97 * errors[0]


def run(folder: Path, text: Path, scheme: dict[str, str], *steps: dict[str, Any]) -> tuple[Any, Any]:
    recipe = parse_recipe({"name": "x", "scheme": scheme, "steps": list(steps)})
    settings = nybble.Settings(samples=4, seq_len=16, batch=4, dtype=torch.float32)
    found: tuple[Any, Any] = nybble.quantize(str(folder), recipe, str(text), settings=settings)
    return found


@pytest.mark.parametrize(
    "before",
    [
        [{"solver": "gptq", "inputs": "both"}],
        [{"solver": "rtn"}, {"reconstruction": "mse", "weights": "adaround", "steps": 2}],
    ],
    ids=["gptq", "adaround"],
)
def test_after_any_method(tmp_path: Path, before: list[dict[str, Any]]) -> None:
    """Codes are those of the recipe without it; scales are stored as they are used."""
    folder, text = save_tiny(tmp_path / "float", num_hidden_layers=1), save_text(tmp_path / "text.txt")
    scheme = {"weights": "int3 group=16 symmetric=false", "inputs": "int8 tensor static"}
    model, report = run(folder, text, scheme, *before, {"correction": "refine-scales"})
    plain, _ = run(folder, text, scheme, *before)
    notes = [note for row in report.layers for note in row.notes if note.startswith("scales refined")]
    assert len(notes) > len(report.layers) // 2
    for note in notes:
        was, now = (float(x) for x in note.removeprefix("scales refined: output error ").split(" -> "))
        assert now <= was
    weights = [m.get_submodule("model.layers.0.mlp.up_proj").weight.qtensor() for m in (plain, model)]
    assert torch.equal(weights[0].codes, weights[1].codes)
    assert not torch.equal(weights[0].params.scale, weights[1].params.scale)
    assert torch.equal(logits(nybble.load(nybble.save(model, tmp_path / "saved"))[0]), logits(model))


def test_alpha_is_the_share_that_scales_make_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what inputs have lost; the first layer's, which are the same whatever was done to others."""
    folder, text = save_tiny(tmp_path / "float", num_hidden_layers=1), save_text(tmp_path / "text.txt")
    scheme, both = {"weights": "int3 group=16", "inputs": "int4 tensor static"}, {"solver": "gptq", "inputs": "both"}
    seen = list[Drift]()

    def spied(*args: Any) -> Any:
        seen.append(args[-1])
        return refined(*args)

    monkeypatch.setattr(refine_scales, "refined", spied)
    first = []
    for alpha in (1.0, 0.25):
        run(folder, text, scheme, both, {"correction": "refine-scales", "alpha": alpha})
        first.append(seen[0])
        seen.clear()
    assert first[0].cross.abs().max() > 0
    torch.testing.assert_close(first[1].cross, 0.25 * first[0].cross)


@pytest.mark.parametrize("line", ["int4 rank1", "float16_e8m7 tensor scale=one"])
def test_what_has_no_scale_a_block_stays(tmp_path: Path, line: str) -> None:
    folder, text = save_tiny(tmp_path / "float", num_hidden_layers=1), save_text(tmp_path / "text.txt")
    _, report = run(folder, text, {"weights": line}, {"correction": "refine-scales"})
    assert all(row.notes == ("block without a scale a block: its scales stay",) for row in report.layers)


def test_bad_input() -> None:
    base = Quantizer("int3 group=16").quantize(matrix())
    assert not movable(base, Quantizer("int3 group=16 scale_format=float32"))
    assert not movable(base, Quantizer("int3 group=16 scale_format=(float8_e4m3fn tensor)"))
    with pytest.raises(SchemeError, match="sweeps=0; at least one"):
        RefineScales(sweeps=0)
    with pytest.raises(SchemeError, match="alpha=2 is a share"):
        RefineScales(alpha=2)
