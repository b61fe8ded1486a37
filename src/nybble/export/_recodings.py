"""The same codes told in other words: what one library keeps as a factor and another as a divisor, and the like.

===========  ========================================================================================  ==============
``centred``  zero points that are all in the middle of an unsigned range -> signed codes without any   the same values
``tiled``    powers of two over 32 columns -> E4M3 scales over 16, above them one power of two          the same values
``divided``  NVFP4 above a factor -> above its reciprocal, a divisor                                    a last bit off
``scaled``   NVFP4 above a divisor -> above its reciprocal, a factor                                    a last bit off
``halved``   scales in float32 -> in float16                                                            rounds scales
===========  ========================================================================================  ==============
Each takes a tensor with its numbers and says None where it is about another kind, or where the numbers don't allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.export._reciprocal import reciprocals
from nybble.formats import get_format
from nybble.granularity import make_granularity
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
        words: what becomes of a tensor. rounds: whether its values change by more than a last bit of float32.
        make: a tensor with its numbers -> the other one; None where there is none.
        looks: whether ``make`` has to see the numbers, else the meta device will do.
    """

    words: str
    make: Callable[[QTensor], QTensor | None]
    rounds: bool = False
    looks: bool = False


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


def _reciprocal(value: Tensor) -> Tensor:
    if value.device.type == "meta":
        return value.float()
    found = torch.tensor([next(reciprocals(value))], dtype=torch.float32)
    return found.view(value.shape)


def divided(tensor: QTensor) -> QTensor | None:
    """ModelOpt's and GGUF's NVFP4 as compressed-tensors has it."""
    found = _outer(tensor)
    if found is None:
        return None
    weight, scale, outer = found
    if isinstance(outer, Inverse):
        return None
    inner = replace(scale, params=replace(scale.params, scale=Inverse(_reciprocal(outer))))
    return replace(weight, params=replace(weight.params, scale=inner))


def scaled(tensor: QTensor) -> QTensor | None:
    """The other way."""
    found = _outer(tensor)
    if found is None:
        return None
    weight, scale, outer = found
    if not isinstance(outer, Inverse):
        return None
    inner = replace(scale, params=replace(scale.params, scale=_reciprocal(outer.divisor)))
    return replace(weight, params=replace(weight.params, scale=inner))


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
    Recoding("the same codes, signed", centred, looks=True),
    Recoding("the same codes as NVFP4", tiled, looks=True),
    Recoding("the same codes over a divisor, the factor's reciprocal", divided),
    Recoding("the same codes over a factor, the divisor's reciprocal", scaled),
)
ROUNDING = (Recoding("the same codes, scales in float16", halved, rounds=True, looks=True),)
