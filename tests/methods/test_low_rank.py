"""LoRC: what it gives back is the largest part of the error, by the theorem of Eckart and Young."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import logits, save_text, save_tiny

import nybble
from nybble.core.errors import GranularityError, SchemeError
from nybble.nn.packed import Packed
from nybble.qtensor.low_rank_sum import LowRankSum
from nybble.recipe import parse_recipe

SETTINGS = nybble.Settings(samples=4, seq_len=12, batch=2, dtype=torch.float32)


def run(folder: Path, text: Path, out: Path | None = None, **options: Any) -> tuple[Any, Any]:
    steps = [{"solver": "rtn"}, {"correction": "low-rank", **options}]
    made = parse_recipe({"name": "x", "scheme": {"weights": "int3 channel"}, "steps": steps})
    found: tuple[Any, Any] = nybble.quantize(str(folder), made, str(text), out=out, settings=SETTINGS)
    return found


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return save_tiny(tmp_path / "float"), save_text(tmp_path / "text.txt")


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_left_is_the_tail_of_the_singular_values(place: tuple[Path, Path], rank: int) -> None:
    model, report = run(*place, rank=rank, factors="float32")
    exact = nybble.load(place[0], dtype=torch.float32)[0]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        truth = exact.model.layers[1].get_submodule(name).weight.detach()
        packed = model.model.layers[1].get_submodule(name).weight.qtensor()
        assert isinstance(packed, LowRankSum) and packed.a.shape[-1] == rank == packed.b.shape[-2]
        values = torch.linalg.svdvals((truth - packed.base.dequantize()).double())
        left = (truth - packed.dequantize()).double().square().sum()
        torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-5, atol=1e-9)
    row = next(row for row in report.layers if row.name.endswith("layers.1.mlp.down_proj"))
    assert row.weights == f"int3 channel + rank {rank}" and row.bits > 3 + 32 * rank * (32 + 48) / (32 * 48)
    assert f"rank {rank} in float32: weight error" in " ".join(row.notes)
    assert row.error is not None and row.rtn_error is not None and row.error < row.rtn_error


def test_more_rank_is_less_error_and_none_is_nothing(place: tuple[Path, Path]) -> None:
    exact = logits(nybble.load(place[0], dtype=torch.float32)[0])
    found = {rank: run(*place, rank=rank, factors="float32") for rank in (0, 2, 8, 16)}
    worst = [max(row.error for row in found[rank][1].layers) for rank in found]
    assert worst == sorted(worst, reverse=True) and len(set(worst)) == 4
    plain = parse_recipe({"name": "x", "scheme": {"weights": "int3 channel"}, "steps": [{"solver": "rtn"}]})
    without, _ = nybble.quantize(str(place[0]), plain, str(place[1]), settings=SETTINGS)
    assert torch.equal(logits(found[0][0]), logits(without))
    lost = [float((logits(model) - exact).norm()) for model, _ in found.values()]
    assert lost[3] < 0.5 * lost[0]


@pytest.mark.parametrize("factors", ["float16", "int8 channel", "float8_e4m3fn channel"])
def test_factors_are_stored_as_they_are_used(place: tuple[Path, Path], tmp_path: Path, factors: str) -> None:
    out, _ = run(*place, out=tmp_path / "out", rank=4, factors=factors)
    memory, report = run(*place, rank=4, factors=factors)
    assert torch.equal(logits(nybble.load(out)[0]), logits(memory))
    assert all("weight error" in " ".join(row.notes) for row in report.layers)


def test_what_cannot_be_is_said(place: tuple[Path, Path]) -> None:
    with pytest.raises(SchemeError, match=r"rank=17, and the weight is 16 x 32; take at most 16.*targets"):
        run(*place, rank=17)
    with pytest.raises(SchemeError, match="rank=-1"):
        run(*place, rank=-1)
    for rank in (4, 5):  # neither divides the rank; then the columns of the weight
        with pytest.raises(GranularityError, match=r"model\.layers\.0\.self_attn\.q_proj: .*group=5"):
            run(*place, rank=rank, factors="int8 group=5")
    model, _ = run(*place, rank=2, targets=["re:.*down_proj"])
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.down_proj.weight.qtensor(), LowRankSum)
    assert not isinstance(layer.mlp.up_proj.weight.qtensor(), LowRankSum)


def test_what_would_be_worse_is_left_out(place: tuple[Path, Path]) -> None:
    """Factors of two values lose far more than they give back: codes stay as the solver left them, and it is said."""
    model, report = run(*place, rank=2, factors="binary tensor")
    assert not any(isinstance(m.qtensor(), LowRankSum) for m in model.modules() if isinstance(m, Packed))
    plain = parse_recipe({"name": "x", "scheme": {"weights": "int3 channel"}, "steps": [{"solver": "rtn"}]})
    without, rows = nybble.quantize(str(place[0]), plain, str(place[1]), settings=SETTINGS)
    assert torch.equal(logits(model), logits(without))
    for row, was in zip(report.layers, rows.layers, strict=True):
        assert row.error == was.error
        assert row.notes == (f"rank 2 would not lower its error ({was.error:.3g}): left out",)


def test_layers_whose_weights_stay_in_float_are_passed_over(place: tuple[Path, Path]) -> None:
    rules = [{"targets": ["re:.*down_proj"], "inputs": "int8 token"}, {"weights": "int3 channel"}]
    steps = [{"solver": "rtn"}, {"correction": "low-rank", "rank": 2}]
    made = parse_recipe({"name": "x", "scheme": {"rules": rules}, "steps": steps})
    model, report = nybble.quantize(str(place[0]), made, str(place[1]), settings=SETTINGS)
    found: Any = model
    assert not isinstance(found.model.layers[0].mlp.down_proj.weight, Packed)
    assert isinstance(found.model.layers[0].mlp.up_proj.weight.qtensor(), LowRankSum)
    assert all((row.weights is None) == row.name.endswith("down_proj") == (not row.notes) for row in report.layers)


def test_factors_drawn_by_chance(place: tuple[Path, Path]) -> None:
    with pytest.raises(SchemeError, match=r"low-rank: factors=int8 channel rounding=stochastic are drawn by chance"):
        run(*place, factors="int8 channel rounding=stochastic")
