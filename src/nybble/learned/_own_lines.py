"""Lines that a packed weight may be of, read from itself: who packed it elsewhere left none.

Several rules store scales alike; which of these lines gives a weight's very tensors is for the caller to see.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nybble.core.errors import NybbleError
from nybble.qtensor.block import BlockQTensor
from nybble.quantizer import Quantizer

_OF_POWERS = ("scale=pow2",)
_PLAIN = ("", "scale=two-level")
_WITH_ZERO = ("symmetric=false",)
_WITH_OFFSET = ("scale=minmax(offset=true)", "center=mean")


def own_quantizers(packed: BlockQTensor) -> Iterator[Quantizer]:
    """Quantizers of the weight's format, granularity, and storage of scales."""
    for line in _lines(packed):
        try:
            yield Quantizer(line)
        except NybbleError:  # words that don't go together
            continue


def _lines(packed: BlockQTensor) -> Iterator[str]:
    params = packed.params
    stored = {"scale_format": params.scale, "offset_format": params.offset}
    words = [f"{name}={_stored(value)}" for name, value in stored.items() if isinstance(value, Tensor | BlockQTensor)]
    common = " ".join((packed.format.name, str(packed.granularity), f"packing={packed.layout}", *words))
    rules: tuple[str, ...] = _PLAIN
    if params.zero_point is not None:
        rules = _WITH_ZERO
    elif params.offset is not None:
        rules = _WITH_OFFSET
    elif isinstance(params.scale, BlockQTensor) and params.scale.format.name == "float8_e8m0fnu":
        rules = _OF_POWERS
    for rule in rules:
        yield f"{common} {rule}".strip()


def _stored(value: Tensor | BlockQTensor) -> str:
    """How scales are stored: a dtype, or a line of their own."""
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    one = value.params.scale is None
    inner = "scale=one" if one else f"scale_format={_stored(value.params.scale)}"  # type: ignore[arg-type]
    center = " center=mean" if value.params.offset is not None else ""
    return f"({value.format.name} {value.granularity} {inner}{center})"
