"""Outlier columns: which are kept, what is stored, what it costs, and when it helps (Dettmers & Zettlemoyer 2022)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import SchemeError, UsageError
from nybble.qtensor.split import SplitQTensor
from nybble.quantizer import Quantizer
from nybble.solvers import Solved, Stats, Weight, make_solver
from nybble.solvers.outlier_columns import OutlierColumns

ROWS, COLUMNS = 64, 100
LOUD = (7, 31, 90)
LINE = "float3_e2m0_finite flat=64 scale_format=float16"


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def moment(seed: int = 5) -> Tensor:
    x = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= 20
    return x.T @ x / 300


def solve(solver: OutlierColumns, *weights: Tensor, second: Tensor | None = None, line: str = LINE) -> list[Solved]:
    given = [Weight(name=f"w{i}", matrix=w, quantizer=Quantizer(line)) for i, w in enumerate(weights)]
    return solver.solve(given, Stats(second_moment=second))


def split(solved: Solved) -> tuple[list[int], SplitQTensor]:
    """The columns that were kept, and the tensor."""
    tensor = solved.weight
    assert isinstance(tensor, SplitQTensor)
    return tensor.slices()[1].tolist(), tensor


def test_loud_inputs_are_kept_and_the_rest_is_the_quantizer() -> None:
    w, second = matrix(), moment()
    (found,) = solve(OutlierColumns(share=0.03), w, second=second)
    kept, tensor = split(found)
    assert kept == list(LOUD)
    dense, rest = tensor.dequantize(), [c for c in range(COLUMNS) if c not in LOUD]
    assert torch.equal(dense[:, LOUD], w[:, LOUD].half().float())
    assert torch.equal(dense[:, rest], Quantizer(LINE).quantize(w[:, rest]).dequantize())
    assert found.stored == f"{Quantizer(LINE)}; 3 of 100 columns float16"
    assert found.error == relative_error(w, dense, second)
    assert found.error < 0.25 * found.rtn_error  # three inputs carry 92 % of the energy


def test_bits_are_those_of_the_paper() -> None:
    """k + 16 / B + p (16 - k - 16 / B), and which part it is in: a bit a column."""
    (found,) = solve(OutlierColumns(share=0.04), matrix(), second=moment())
    blocks = -(-ROWS * 96 // 64)
    stored = 3 * ROWS * 96 + 16 * blocks + 16 * ROWS * 4 + 8 * -(-COLUMNS // 8)
    assert found.weight.bits_per_element() == stored / (ROWS * COLUMNS)
    assert found.weight.bytes_by_role()["unquantized"] == 2 * ROWS * 4


def test_without_calibration_the_weights_say() -> None:
    """A column scaled by 20 in either of two weights that share their input is kept in both; inputs don't matter."""
    first, second = matrix(0), matrix(1)
    first[:, 11] *= 20
    second[:, 60] *= 20
    for moments in (None, moment()):
        solver = OutlierColumns(share=0.02, by="weights")
        assert [split(x)[0] for x in solve(solver, first, second, second=moments)] == [[11, 60], [11, 60]]
    assert split(solve(OutlierColumns(share=0.02), first, second)[0])[0] == [11, 60]


def test_as_many_as_the_groups_ask() -> None:
    w = torch.cat([matrix(), matrix(1)], 1)[:, :128]
    second = torch.eye(128)
    second[3, 3] = 100
    (found,) = solve(OutlierColumns(share=0.01), w, second=second, line="int3 group=32")
    assert len(split(found)[0]) == 32 and 3 in split(found)[0]
    (found,) = solve(OutlierColumns(share=0.01), w[:, :32], second=second[:32, :32], line="int3 group=32")
    assert "no share of columns up to half leaves what group=32 divides" in found.notes[0]
    assert torch.equal(found.weight.dequantize(), Quantizer("int3 group=32").quantize(w[:, :32]).dequantize())
    assert not found.stored and found.error == found.rtn_error


@pytest.mark.parametrize("keep", ["bfloat16", "float32", "int8 channel"])
def test_kept_in_something_else(keep: str) -> None:
    w = matrix()
    (found,) = solve(OutlierColumns(share=0.03, keep=keep), w, second=moment())
    want = w[:, LOUD].to(getattr(torch, keep)).float() if " " not in keep else None
    want = Quantizer(keep).quantize(w[:, LOUD]).dequantize() if want is None else want
    assert torch.equal(found.weight.dequantize()[:, LOUD], want)
    assert str(found.stored).endswith(f"3 of 100 columns {keep}")


def test_weights_beyond_float16_fall_back() -> None:
    w = matrix()
    w[0, LOUD[0]] = 1e6
    (found,) = solve(OutlierColumns(share=0.03), w, second=moment(), line="int8 channel")
    assert found.error == found.rtn_error and "kept the latter" in found.notes[0]


def test_groups_of_a_convolution_keep_the_same_columns() -> None:
    (found,) = solve(OutlierColumns(share=0.03), matrix(), second=torch.stack([moment(1), moment(2)]))
    assert split(found)[0] == list(LOUD)


def test_bad_input() -> None:
    for share in (-0.1, 0.6):
        with pytest.raises(SchemeError, match=r"0 <= share <= 0.5"):
            OutlierColumns(share=share)
    with pytest.raises(SchemeError, match=r"by.*inputs.*largest.*mean.*weights"):
        make_solver("outlier-columns", {"by": "std"})
    with pytest.raises(SchemeError, match="span=whole is about scales, and float16 has none"):
        OutlierColumns(span="whole")
    with pytest.raises(SchemeError, match=r"span=whole.*group=16 has others for fewer columns"):
        OutlierColumns(keep="int4 group=16", span="whole")
    with pytest.raises(UsageError, match="float17"):
        OutlierColumns(keep="float17")
