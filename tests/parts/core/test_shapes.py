"""Shapes in signatures: a call against its contract fails here; elsewhere jaxtyping isn't needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tests.shapes import MODULES, ShapeError
from torch import Tensor

from nybble.calibration.error import relative_error
from nybble.core.errors import DataError, UsageError
from nybble.formats import NumberFormat
from nybble.learned import WEIGHTS, Learned
from nybble.ops.grid import Grid
from nybble.ops.rounding import round_to
from nybble.ops.tables import table_round
from nybble.optim.adamw import AdamW, AdamWOptions
from nybble.qtensor import QuantParams
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer
from nybble.scales import BlockParams, ScaleRule
from nybble.solvers import Solved, Stats, Weight
from nybble.solvers.gptq import Gptq
from nybble.solvers.rtn import Rtn

INT4 = Quantizer("int4 channel")


def weight(columns: int, rows: int = 4) -> Weight:
    return Weight(name="w", matrix=torch.randn(rows, columns), quantizer=INT4)


class Half(Learned):
    """A part that forgets half of what it gets, in training, and settles to the whole."""

    def estimate(self, x: Tensor) -> Tensor:
        return x[:1]

    def settle(self, x: Tensor) -> BlockQTensor:
        return self.quantizer.quantize(x)

    def penalty(self, t: float | Tensor) -> Tensor:
        return torch.full((1,), float(t))


@dataclass(frozen=True)
class Flat(ScaleRule):
    """A rule that finds a scale for every second block."""

    def fit(self, blocks: Tensor, fmt: NumberFormat, rounding: str, weight: Tensor | None = None) -> BlockParams:
        return BlockParams(blocks.abs().amax(1, keepdim=True)[::2])


def test_every_module_has_contracts() -> None:
    """Found again in a fresh process: here they are wrapped already."""
    code = "from tests.shapes import check_contracts; print(check_contracts())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = eval(done.stdout)
    assert list(found) == list(MODULES) and all(found.values())
    assert {"Stats.__init__", "Solver.solve", "Solver.solve_product"} <= set(found["nybble.solvers"])
    assert {"round_to", "encode", "decode"} <= set(found["nybble.ops.rounding"])
    assert "Learned.settle" in found["nybble.learned"] and "Quantizer.codes_of" in found["nybble.quantizer"]


def test_fields() -> None:
    with pytest.raises(ShapeError, match=r"second_moment is torch.float32 \[4, 5\].*columns columns"):
        Stats(second_moment=torch.ones(4, 5))
    with pytest.raises(ShapeError, match=r"inputs is torch.float32 .*with self.second_moment"):
        Stats(second_moment=torch.ones(4, 4), inputs=torch.ones(9, 5))
    with pytest.raises(ShapeError, match="float64"):
        Stats(second_moment=torch.eye(4).double())
    with pytest.raises(ShapeError, match=r"fisher is {a: .*, b: torch.float32"):
        Stats(fisher={"a": torch.ones(9, 4), "b": torch.ones(9, 4, 1)})
    with pytest.raises(ShapeError, match=r"matrix is torch.bfloat16"):
        Weight(name="w", matrix=torch.ones(4, 4, dtype=torch.bfloat16), quantizer=INT4)
    with pytest.raises(ShapeError, match="clip"):
        Solved(weight=INT4.quantize(torch.ones(4, 4)), error=0.0, rtn_error=0.0, clip=torch.ones(4, 1))


@pytest.mark.parametrize("solver", [Rtn(), Gptq()])
def test_weights_and_what_calibration_saw(solver: Rtn | Gptq) -> None:
    """Each weight has the columns of the second moment, and rows of its own."""
    stats = Stats(second_moment=torch.eye(8))
    assert len(solver.solve([weight(8), weight(8, rows=6)], stats)) == 2
    with pytest.raises(ShapeError, match=r"item.matrix is torch.float32 \[4, 16\].*second_moment"):
        solver.solve([weight(8), weight(16)], stats)


def test_overrides_of_parts_that_come_later() -> None:
    x = torch.randn(4, 8)
    half = Half(INT4, WEIGHTS)
    assert half.eval()(x).shape == x.shape
    with pytest.raises(ShapeError, match=r"Half.estimate: return is torch.float32 \[1, 8\].*with x = .*\[4, 8\]"):
        half.train()(x)
    with pytest.raises(ShapeError, match=r"Half.penalty: return"):
        half.penalty(0.5)
    with pytest.raises(ShapeError, match=r"Flat.fit: return.scale is torch.float32 \[2, 1\]"):
        Flat().fit(x, INT4.format, "nearest-even")


def test_functions_and_ops() -> None:
    with pytest.raises(ShapeError, match=r"relative_error: second_moment"):
        relative_error(torch.ones(4, 8), torch.ones(4, 8), torch.eye(4))
    with pytest.raises(UsageError, match=r"round_to: x in torch.int64"):  # looked at by the operator itself
        round_to(torch.ones(3).long(), "int4", "nearest-even")
    with pytest.raises(ShapeError, match=r"y is torch.float16"):
        Grid(INT4.format).nearest(torch.ones(3).half())
    with pytest.raises(UsageError, match=r"table_round: thresholds \[3\] and a table \[3\]"):
        table_round(torch.ones(3), torch.ones(3), torch.ones(3))
    options = AdamWOptions()
    with pytest.raises(ShapeError, match="grad"):
        AdamW.update(torch.ones(3), torch.ones(1), dict.fromkeys(AdamW.states, torch.zeros(3)), 1, options)


def test_the_same_call_right_and_wrong() -> None:
    """Verdicts are remembered by shapes and dtypes, of every argument."""
    grid = Grid(INT4.format)
    for _ in range(2):
        grid.nearest(torch.ones(3))
        with pytest.raises(ShapeError, match=r"y is torch.float16"):
            grid.nearest(torch.ones(3).half())


def test_what_nybble_refuses_itself_passes() -> None:
    with pytest.raises(DataError, match="codes are integers"):
        INT4.pack(torch.ones(4, 8), QuantParams(torch.ones(4, 1)))


def test_jaxtyping_is_not_needed() -> None:
    """Nor imported where it is there, before somebody asks for the hints."""
    hints = f"""
import importlib, sys, typing
modules = [importlib.import_module(name) for name in {MODULES!r}]
from nybble.solvers import Stats
from nybble.quantizer import Quantizer
import torch
Quantizer("nvfp4").quantize(torch.randn(4, 32)).dequantize()
early = "jaxtyping" in sys.modules
print(early, typing.get_type_hints(Stats)["inputs"])
"""
    without = "import sys; sys.modules['jaxtyping'] = None\n"
    assert run(without + hints.replace("early = ", "early = None and ")) == "None torch.Tensor | None\n"
    assert run(hints) == "False jaxtyping.Float[Tensor, '*groups tokens columns'] | None\n"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
