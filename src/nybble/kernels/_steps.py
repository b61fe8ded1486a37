"""What the kernels of an optimizer's step share on every device: what they can step, and the numbers of a step."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nybble.granularity.flat import Flat
from nybble.granularity.rank1 import Rank1
from nybble.optim._forms import forms, reciprocal
from nybble.optim._fused import Spec
from nybble.optim._states import Kept, quantizer
from nybble.qtensor import Factored
from nybble.qtensor.block import BlockQTensor
from nybble.rounding import get_rounding
from nybble.scales.absmax import AbsMax

RULES = ("adamw", "adam", "sgd", "lion", "rmsprop", "adagrad")
FIRST = ("exp_avg", "momentum_buffer")
"""Names of a state of both signs; any other is a mean or sum of squares."""
_LARGEST = 4096


@dataclass(frozen=True)
class Numbers:
    """Of one step, in the order in which kernels take them; each is rounded to float32 there.

    Attributes:
        rate: what the direction is multiplied with. shrink: what the parameter is, for its decay. decay: the share of
            the parameter that a gradient gets. b1, a1: shares of the first state and of what is new in it; b2, a2: of
            the second. root: sqrt(1 - b2^t). eps: beside the root. initial: of a sum at the first step.
    """

    rate: float = 0.0
    shrink: float = 1.0
    decay: float = 0.0
    b1: float = 0.0
    a1: float = 0.0
    b2: float = 0.0
    a2: float = 0.0
    root: float = 1.0
    eps: float = 0.0
    initial: float = 0.0

    def all(self, div: int) -> tuple[float, ...]:
        """In their order; behind the root what torch multiplies with instead, by its form of a division."""
        *most, root, eps, initial = (float(x) for x in astuple(self))
        return *most, root, reciprocal(root, div), eps, initial


def numbers(rule: str, options: Any, step: int) -> Numbers:
    """Of a step of a rule, calculated as the rule does."""
    lr, decay = options.lr, options.weight_decay
    if rule in ("adamw", "adam"):
        b1, b2 = options.betas
        return Numbers(
            -(lr / (1 - b1**step)), 1 - lr * decay, decay, b1, 1 - b1, b2, 1 - b2, (1 - b2**step) ** 0.5, options.eps
        )
    if rule == "lion":
        b1, b2 = options.betas
        return Numbers(-lr, 1 - lr * decay, decay, b1, 1 - b1, b2, 1 - b2)
    if rule == "sgd":
        return Numbers(-lr, 1.0, decay, options.momentum, 1 - options.dampening)
    if rule == "rmsprop":
        return Numbers(-lr, 1.0, decay, options.momentum, 1.0, options.alpha, 1 - options.alpha, eps=options.eps)
    rate = lr / (1 + (step - 1) * options.lr_decay)
    return Numbers(-rate, 1.0, decay, eps=options.eps, initial=options.initial_accumulator_value)


def number_refusal(rule: str, options: Any) -> str | None:
    """Why a rule with these options has no kernel."""
    if rule in ("adamw", "adam") and not 1 - options.betas[0] < 0.5:
        return "beta1 of at most 1/2, where torch's lerp takes another form"
    if rule == "rmsprop" and options.centered:
        return "centered"
    return None


@lru_cache(maxsize=1024)
def refusal(spec: Spec) -> str | None:
    """Why parameters of this kind have no kernel; None where they have one."""
    if spec.rule not in RULES:
        return f"the rule {spec.rule} has none"
    if forms(spec.device) is None:
        return f"torch {torch.__version__} rounds its operations in a way that is not known"
    for name, kind, line in spec.states:
        if line is None:
            continue
        if spec.keep_sign and kind == "signed":
            return "keep_sign"
        why = line_refusal(line)
        if why is None and isinstance(quantizer(line).granularity, Rank1):
            why = _rank1_refusal(spec, name, line)
        if why is not None:
            return f"{name} in {line!r}: {why}"
    return None


def line_refusal(line: str) -> str | None:
    """Why kernels keep no state in a quantizer."""
    q = quantizer(line)
    rounding = get_rounding(q.rounding)
    if rounding.stochastic or rounding.native:
        return f"rounding={q.rounding}"
    if q.format.bits not in (4, 8) or q.packing != "dense":
        return "codes of neither 4 nor 8 bits"
    if q.format.negative_zero is not None and q.rounding != "nearest-even":
        return f"a minifloat with rounding={q.rounding}"
    if not isinstance(q.scale, AbsMax) or q.floor or q.center or q.raw_scale:
        return "another scale than the largest magnitude"
    if isinstance(q.granularity, Rank1):
        return None
    if not isinstance(q.granularity, Flat) or q.scale_format != "float32":
        return "scales other than float32 of blocks of neighbours (flat)"
    size = q.granularity.size
    if size & (size - 1) or not 16 <= size <= _LARGEST:
        return f"blocks of {size}, and kernels have powers of two from 16 to {_LARGEST}"
    return None


def _rank1_refusal(spec: Spec, name: str, line: str) -> str | None:
    """Scales of rows and columns are found before any code is, by going over the second state alone."""
    q = quantizer(line)
    if name in FIRST or (len(spec.states) > 1 and spec.rule not in ("adamw", "adam")):
        return "scales of rows and columns of a momentum"
    if spec.dims != 2 or not spec.even:
        return "rows and columns of other than matrices of an even number of columns"
    return None if target_of(line) == 1.0 and not q.reciprocal else "scales that are divided"


def target_of(line: str) -> float:
    """What the largest magnitude of a block is mapped to."""
    scale = quantizer(line).scale
    assert isinstance(scale, AbsMax)
    return float(scale.target or quantizer(line).format.absmax)


def place_state(row: Any, state: Kept, codes: int, scale: int, columns: int) -> None:
    """Write addresses of a state into a tensor's row of a table.

    Args:
        row: whole numbers of 8 bytes.
        state: as an optimizer keeps it.
        codes: where its codes' address goes, or that of float32 values.
        scale: its scales', of rank-1 scales those of the rows.
        columns: and of the columns.
    """
    if isinstance(state, Tensor):
        row[codes] = state.data_ptr()
        return
    assert isinstance(state, BlockQTensor)
    row[codes] = state.codes.data_ptr()
    found = state.params.scale
    if isinstance(found, Factored):
        row[scale], row[columns] = (factor.data_ptr() for factor in found.factors)  # type: ignore[union-attr]
    else:
        assert isinstance(found, Tensor)
        row[scale] = found.data_ptr()
