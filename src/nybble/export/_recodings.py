"""The same codes told in other words: what one library keeps as a factor and another as a divisor, and the like.

===========  ========================================================================================  ==============
``centred``  zero points that are all in the middle of an unsigned range -> signed codes without any   the same values
``signed``   offsets that are whole multiples of scales -> signed codes, where those have the range    the same values
``whole``    such offsets -> integer zero points                                                       the same values
``tiled``    powers of two over 32 columns -> E4M3 scales over 16, above them one power of two          the same values
``divided``  NVFP4 above a factor -> above its reciprocal, a divisor, where the scales' values stay     the same values
``scaled``   NVFP4 above a divisor -> above its reciprocal, a factor, where the scales' values stay     the same values
``nudged``   the same two where no reciprocal gives these values                                       a last bit off
``halved``   scales in float32 -> in float16                                                            rounds scales
===========  ========================================================================================  ==============
Each takes a tensor with its numbers and says None where it is about another kind, or where the numbers don't allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nybble.export._ct_tensors import exact_divisor
from nybble.export._last_bit import exact_reciprocal
from nybble.export._mo_tensors import exact_factor
from nybble.export._reciprocal import reciprocals
from nybble.export._source import Layer, Source
from nybble.formats import get_format
from nybble.granularity import make_granularity
from nybble.models.sources.layouts._pieces import integers
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QTensor, QuantParams
from nybble.qtensor.block import BlockQTensor

E2M1, E4M3, E8M0 = "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu"
_LEAST, _MOST = -9, 8  # exponents of the powers of two that E4M3 has
_SPAN = _MOST - _LEAST


@dataclass(frozen=True)
class Recoding:
    """A way to keep codes.

    Attributes:
        words: what becomes of a tensor. rounds: whether its values change.
        make: a tensor with its numbers -> the other one; None where there is none.
        looks: which numbers ``make`` has to see: ``all``; ``scales``, which is all but the codes; or none (empty): the
            meta device will do.
    """

    words: str
    make: Callable[[QTensor], QTensor | None]
    rounds: bool = False
    looks: Literal["", "scales", "all"] = ""


def seen_by(recoding: Recoding, source: Source, layer: Layer, prefix: str) -> QTensor:
    """A matrix of a layer with the numbers that ``make`` has to see."""
    if recoding.looks == "all":
        return source.weight(layer, prefix)
    return source.scales(layer, prefix) if recoding.looks else layer.weights[prefix]


def centred(tensor: QTensor) -> QTensor | None:
    """GPTQ's symmetric weights: ``scale * (code - 8)`` of unsigned codes is ``scale * code`` of signed ones."""
    if not isinstance(tensor, BlockQTensor) or not isinstance(tensor.params.zero_point, BlockQTensor):
        return None
    zero, bits = tensor.params.zero_point, tensor.format.bits
    unsigned = tensor.format.name == f"uint{bits}"
    if not (unsigned or tensor.format.name == f"int{bits}_full") or zero.params.scale is not None:
        return None
    if not bool((zero.dequantize() == (1 << (bits - 1) if unsigned else 0)).all()):
        return None
    codes = tensor.codes
    if unsigned:
        flipped = tensor.unpacked() ^ (1 << (bits - 1))
        codes = get_layout(tensor.layout).pack(flipped.reshape(-1), bits)
    params = replace(tensor.params, zero_point=None)
    return replace(tensor, format=get_format(f"int{bits}_full"), codes=codes, params=params)


@dataclass(frozen=True)
class _Counted:
    """Integers over scales and offsets: bits, codes [out, in], and the zero point of each code's block, all int16."""

    bits: int
    codes: Tensor
    zeros: Tensor
    blocks: Tensor


def _counted(tensor: QTensor) -> _Counted | None:
    """MLX's and Q4_1's kind, where every offset is a whole number of scales that a zero point can be."""
    if not isinstance(tensor, BlockQTensor) or tensor.granularity.factored or tensor.params.zero_point is not None:
        return None
    scale, offset, bits = tensor.params.scale, tensor.params.offset, tensor.format.bits
    if not isinstance(scale, Tensor) or not isinstance(offset, Tensor) or scale.numel() != offset.numel():
        return None
    (rows, columns), count = tensor.shape, scale.numel()
    if tensor.format.name != f"uint{bits}" or bits < 2 or count % rows or columns % (count // rows):
        return None
    steps, low = scale.double().reshape(rows, -1), offset.double().reshape(rows, -1)
    zeros = torch.where((steps == 0) & (low == 0), 1 << (bits - 1), -low / steps)
    if not bool(((zeros >= 0) & (zeros < 1 << bits)).all()):
        return None
    blocks = zeros.round().to(torch.int16)
    codes = tensor.unpacked().view(rows, columns).to(torch.int16)
    return _Counted(bits, codes, blocks.repeat_interleave(columns // blocks.shape[1], 1), blocks)


def _if_same(made: BlockQTensor, tensor: QTensor) -> BlockQTensor | None:
    return made if torch.equal(made.dequantize(), tensor.dequantize()) else None


def signed(tensor: QTensor) -> QTensor | None:
    """``scale * code - 8 * scale`` of unsigned codes is ``scale * code`` of signed ones."""
    found = _counted(tensor)
    if found is None:
        return None
    assert isinstance(tensor, BlockQTensor)
    half, values = 1 << (found.bits - 1), found.codes - found.zeros
    if bool(((values < -half) | (values >= half)).any()):
        return None
    codes = get_layout(tensor.layout).pack((values & (2 * half - 1)).to(torch.uint8).reshape(-1), found.bits)
    params = replace(tensor.params, offset=None)
    return _if_same(replace(tensor, format=get_format(f"int{found.bits}_full"), codes=codes, params=params), tensor)


def whole(tensor: QTensor) -> QTensor | None:
    """``scale * code - z * scale`` is ``scale * (code - z)``, if float32 rounds no value of it otherwise."""
    found = _counted(tensor)
    if found is None:
        return None
    assert isinstance(tensor, BlockQTensor)
    zeros = integers(found.blocks.to(torch.uint8), tensor.format.name)
    return _if_same(replace(tensor, params=replace(tensor.params, offset=None, zero_point=zeros)), tensor)


def tiled(tensor: QTensor) -> QTensor | None:
    """MXFP4 as NVFP4, where the exponents of all blocks that aren't zero lie within E4M3's 18 powers of two."""
    if not isinstance(tensor, BlockQTensor) or tensor.format.name != E2M1 or tensor.layout != "dense":
        return None
    scale = tensor.params.scale
    if not isinstance(scale, BlockQTensor) or scale.format.name != E8M0 or scale.params.scale is not None:
        return None
    if str(tensor.granularity) != "group=32" or tensor.params.zero_point is not None:
        return None
    exponents = scale.unpacked().view(-1).to(torch.int16) - 127
    used = ((tensor.unpacked().view(len(exponents), 32) & 7) != 0).any(1)
    if bool((exponents == 128).any()):
        return None  # NaN
    high = int(exponents[used].max()) if bool(used.any()) else 0
    low = int(exponents[used].min()) if bool(used.any()) else 0
    if high - low > _SPAN or not -126 <= high - _MOST <= 127:
        return None
    inner = torch.where(used, exponents - (high - _MOST), 0).float().exp2().to(torch.float8_e4m3fn)
    codes = inner.view(torch.uint8).repeat_interleave(2)
    rows, columns = tensor.shape
    outer = torch.tensor([[2.0 ** (high - _MOST)]], dtype=torch.float32)
    made = BlockQTensor(get_format(E4M3), make_granularity("tensor"), (rows, columns // 16), codes, QuantParams(outer))
    return replace(tensor, granularity=make_granularity("group=16"), params=QuantParams(made))


def _outer(tensor: QTensor) -> tuple[BlockQTensor, BlockQTensor, Tensor | Inverse] | None:
    """An NVFP4 tensor, its scales, and what is above them."""
    if not isinstance(tensor, BlockQTensor) or tensor.format.name != E2M1:
        return None
    scale = tensor.params.scale
    if not isinstance(scale, BlockQTensor) or scale.format.name != E4M3 or scale.params.offset is not None:
        return None
    outer = scale.params.scale
    return (tensor, scale, outer) if isinstance(outer, Tensor | Inverse) else None


def _above(weight: BlockQTensor, scale: BlockQTensor, outer: Tensor | Inverse) -> BlockQTensor:
    inner = replace(scale, params=replace(scale.params, scale=outer))
    return replace(weight, params=replace(weight.params, scale=inner))


def _other(value: Tensor, found: float) -> Tensor:
    return torch.full_like(value, found, dtype=torch.float32)


def divided(tensor: QTensor) -> QTensor | None:
    """ModelOpt's and GGUF's NVFP4 as compressed-tensors has it."""
    return _divided(tensor, exact=True)


def scaled(tensor: QTensor) -> QTensor | None:
    """The other way."""
    return _scaled(tensor, exact=True)


def nudged(tensor: QTensor) -> QTensor | None:
    """Either, with the reciprocal whose values are the same in bfloat16 if there is one, else the nearest."""
    return _divided(tensor, exact=False) or _scaled(tensor, exact=False)


def _divided(tensor: QTensor, exact: bool) -> QTensor | None:
    found = _outer(tensor)
    if found is None or isinstance(found[2], Inverse):
        return None
    weight, scale, outer = found
    assert isinstance(outer, Tensor)
    value = exact_reciprocal(scale.codes, outer) if exact else exact_divisor(outer) or next(reciprocals(outer))
    return None if value is None else _above(weight, scale, Inverse(_other(outer, value)))


def _scaled(tensor: QTensor, exact: bool) -> QTensor | None:
    found = _outer(tensor)
    if found is None or not isinstance(found[2], Inverse):
        return None
    weight, scale, outer = found
    assert isinstance(outer, Inverse)
    nearest = reciprocals(outer.divisor)
    value = exact_reciprocal(scale.codes, outer) if exact else exact_factor(outer) or next(nearest)
    return None if value is None else _above(weight, scale, _other(outer.divisor, value))


def halved(tensor: QTensor) -> QTensor | None:
    """Scales, and real offsets, as GGUF keeps them."""
    if not isinstance(tensor, BlockQTensor) or not isinstance(tensor.params.scale, Tensor):
        return None
    scale, offset = tensor.params.scale, tensor.params.offset
    if scale.dtype == torch.float16 or isinstance(offset, QTensor):
        return None
    halves = scale.to(torch.float16)
    if halves.device.type != "meta" and not bool(halves.isfinite().all()):
        return None
    params = replace(tensor.params, scale=halves, offset=None if offset is None else offset.to(torch.float16))
    return replace(tensor, params=params)


EXACT = (
    Recoding("the same codes, signed", centred, looks="all"),
    Recoding("the same codes, signed, without an offset", signed, looks="all"),
    Recoding("the same codes over integer zero points", whole, looks="all"),
    Recoding("the same codes as NVFP4", tiled, looks="all"),
    Recoding("the same codes over a divisor, the factor's reciprocal", divided, looks="scales"),
    Recoding("the same codes over a factor, the divisor's reciprocal", scaled, looks="scales"),
)
NUDGED = (Recoding("the same codes, a last bit off under the reciprocal", nudged, rounds=True, looks="scales"),)
"""Those that any wish to round allows."""
ROUNDING = (Recoding("the same codes, scales in float16", halved, rounds=True, looks="all"),)
