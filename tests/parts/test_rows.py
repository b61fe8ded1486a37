"""Rows of quantized matrices: the same values, or a refusal; and layers that share an outer scale."""

from __future__ import annotations

import pytest
import torch

from nybble.core.errors import GranularityError
from nybble.qtensor._rows import split_rows, take_rows
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scheme import shares_over_rows
from nybble.solvers import Solved, Stats, Weight
from nybble.walk.steps._together import joined, solve_joined

LINES = [
    "int4 group=16", "int4 channel", "int4 tensor", "int3 group=32 symmetric=false", "nvfp4", "nvfp4-ct", "mxfp4",
    "int4 group=16 scale=minmax(offset=true)", "mxfp6", "float8_e4m3fn block=8x16", "int4 flat=32", "int4 flat=64",
    "int4 flat=96", "int4 flat=128", "nf4-dq", "int4 group=16 scale_format=(int8 group=2)", "linear4 rank1",
    "int4 block=2x32 scale_format=(int8 channel)", "b1.58 packing=base3",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("rows", [range(8), range(8, 24), [3, 1, 30], [31], range(1, 9)], ids=str)
def test_rows_keep_their_values(line: str, rows: object) -> None:
    tensor = Quantizer(line).quantize(torch.randn(32, 64).abs() if line.startswith("linear") else torch.randn(32, 64))
    try:
        found = take_rows(tensor, list(rows))  # type: ignore[call-overload]
    except GranularityError:
        assert any(word in line for word in ("block", "flat=96", "flat=128", "nf4-dq"))
        return
    assert torch.equal(found.dequantize(), tensor.dequantize()[list(rows)])  # type: ignore[call-overload]
    rebuilt = BlockQTensor.rebuild(found.spec(), found.tensors())
    assert torch.equal(rebuilt.dequantize(), found.dequantize())


def test_rows_that_share_a_scale_with_others_are_refused() -> None:
    tensor = Quantizer("float8_e4m3fn block=8x16").quantize(torch.randn(32, 64))
    assert torch.equal(take_rows(tensor, range(8, 24)).dequantize(), tensor.dequantize()[8:24])
    with pytest.raises(GranularityError, match="8 rows share a scale"):
        take_rows(tensor, range(4, 12))


def test_parts_share_no_tensor_by_identity() -> None:
    """What two modules share by identity is stored under one name."""
    a, b = split_rows(Quantizer("nvfp4").quantize(torch.randn(8, 32)), [4, 4])
    assert not {id(t) for t in a.tensors().values()} & {id(t) for t in b.tensors().values()}


def weights(line: str) -> list[Weight]:
    quantizer = Quantizer(line)
    return [
        Weight(name=f"block.{leaf}", matrix=torch.randn(8, 32) * size, quantizer=quantizer)
        for leaf, size in (("q_proj", 1.0), ("k_proj", 3.0), ("o_proj", 1.0))
    ]


def test_siblings_are_solved_as_one_where_they_share_a_scale() -> None:
    together = (("q_proj", "k_proj", "v_proj"),)
    assert [len(group) for group in joined(weights("nvfp4"), together)] == [2, 1]
    assert [len(group) for group in joined(weights("int4 group=16"), together)] == [1, 1, 1]
    assert not shares_over_rows(Quantizer("mxfp4"))
    pair = joined(weights("nvfp4"), together)[0]

    def solve(some: list[Weight], stats: Stats) -> list[Solved]:
        return [Solved(weight=w.quantizer.quantize(w.matrix), error=0.5, rtn_error=0.5) for w in some]

    found = solve_joined(solve, pair, Stats())  # type: ignore[arg-type]
    whole = Quantizer("nvfp4").quantize(torch.cat([w.matrix for w in pair])).dequantize()
    assert torch.equal(torch.cat([f.weight.dequantize() for f in found]), whole)
    assert all(f.error == f.rtn_error < 0.1 for f in found)
