"""Products of activations in 8 bits and integer weights as one operator, for which ``kernels/`` has whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from nybble.core.errors import UsageError
from nybble.formats import get_format
from nybble.nn import products
from nybble.nn.compiled import quantizer_of, static_params
from nybble.nn.operands import check_product, check_static
from nybble.nn.products import Operator
from nybble.ops.loader import load_at_first_use
from nybble.qtensor import Spec
from nybble.quantizer import Quantizer

_ROUNDINGS = ("nearest-even", "nearest-even-code")
_SHARED = ("token", "tensor")


def rounds_to_integers(quantizer: Quantizer) -> bool:
    """Whether a row of activations becomes integers of up to 8 bits, one scale and at most one zero point."""
    told = quantizer.reciprocal or quantizer.raw_scale or quantizer.floor or quantizer.center
    scale = quantizer.scale
    return (
        quantizer.format.is_integer
        and quantizer.format.bits <= 8
        and str(quantizer.granularity) in _SHARED
        and quantizer.rounding in _ROUNDINGS
        and not (scale.has_offset or scale.takes_divisor)
        and not told
    )


def holds_integers(spec: Spec) -> bool:
    """Whether a QTensor's values are integers of up to 8 bits times scales."""
    plain = spec["kind"] == "block" and spec.get("layout", "dense") == "dense" and "grid" not in spec
    return plain and get_format(spec["format"]).is_integer


def rounded(x: Tensor, parts: Sequence[Tensor], names: str, line: str) -> Tensor:
    """``x`` as :func:`nybble.nn.compiled.fake_quantize` has it, without gradients."""
    quantizer = quantizer_of(line)
    return quantizer.fake_quantize(x, static_params(quantizer, dict(zip(names.split(), parts, strict=True))))


def reference(
    x: Tensor,
    tensors: Sequence[Tensor],
    key: str,
    shape: Sequence[int],
    bias: Tensor | None,
    parts: Sequence[Tensor],
    names: str,
    line: str,
) -> Tensor:
    """``x`` rounded in its own dtype, and the product of floats.

    Args:
        x: float32, bfloat16 or float16 [..., in].
        tensors: of a QTensor [out, in], as :func:`nybble.nn.products.reference` has them.
        key: as there.
        shape: as there.
        bias: as there.
        parts: static parameters of the quantizer, as :func:`nybble.nn.compiled.fake_quantize` has them.
        names: theirs, with spaces between.
        line: of a quantizer that :func:`rounds_to_integers`.

    Returns:
        [..., out] of the dtype of x. A kernel has the same codes and scales of x, and sums of whole numbers that are
        exact within a block; neither x nor W is rounded to the dtype of x, so its result differs from the exact one by
        no more than this does.
    """
    return products.reference(rounded(x, parts, names, line), tensors, key, shape, bias)


def checker(rounds: Callable[[Quantizer], bool], what: str) -> Callable[..., None]:
    """What checks the arguments of :func:`reference`, of an operator for some quantizers of activations only."""

    @lru_cache(maxsize=4096)
    def known(name: str, line: str) -> bool:
        quantizer = quantizer_of(line)
        if not rounds(quantizer):
            raise UsageError(f"{name}: activations by {line}; it takes what rounds to {what}.")
        return quantizer.static

    def check(name: str, x: Tensor, *given: Any) -> None:
        *weight, parts, names, line = given
        check_product(name, x, *weight)
        check_static(name, line, known(name, line), parts, names, x.device)

    return check


TAKES = f"Tensor x, {products.WEIGHT}, Tensor? bias, Tensor[] parts, str names, str line"
"""Of an operator with :func:`reference`'s arguments, in the schema's language."""
_check = checker(rounds_to_integers, "integers of up to 8 bits, one scale a row or one for all")
integer_linear = Operator("integer_linear", reference, TAKES, products.like_product, _check)
load_at_first_use([integer_linear])
