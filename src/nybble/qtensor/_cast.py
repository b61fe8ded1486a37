"""See :meth:`nybble.qtensor.block.BlockQTensor.cast`."""

from __future__ import annotations

import torch

from nybble.core.errors import SchemeError
from nybble.formats import NumberFormat, get_format
from nybble.granularity import Granularity, make_granularity
from nybble.ops.casting import shifted_codes
from nybble.packing import get_layout
from nybble.qtensor import Inverse, QuantParams, block_view
from nybble.qtensor.block import BlockQTensor


def cast(found: BlockQTensor, target: NumberFormat | str, granularity: Granularity | str) -> BlockQTensor:
    """One real scale for each block of ``granularity``, the ratios to it in the exponents of ``target``."""
    wide = get_format(target) if isinstance(target, str) else target
    share = make_granularity(granularity) if isinstance(granularity, str) else granularity
    params, shape = found.params, found.shape
    for name in ("zero_point", "offset", "grid"):
        if getattr(params, name) is not None:
            raise SchemeError(
                f"an exact cast shifts exponents, and {name.replace('_', ' ')}s have no part in it: take a symmetric "
                f"format, such as {found.format.name} scale=pow2-ratio."
            )
    if isinstance(params.scale, Inverse):
        raise SchemeError("an exact cast needs scales to multiply by; these are stored as a divisor.")
    codes = found.unpacked()
    blocks = found.granularity.to_blocks(codes)
    scale = torch.ones_like(blocks, dtype=torch.float32)
    if params.scale is not None:
        scale = block_view(params.scale, found.granularity, shape).expand(blocks.shape)
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise SchemeError("an exact cast takes scales above 0; this tensor has others, or NaN.")
    each = share.to_blocks(found.granularity.from_blocks(scale, shape))
    largest = each.amax(1, keepdim=True)
    (mantissa, exponent), (wanted, top) = torch.frexp(each), torch.frexp(largest)
    odd = (mantissa != wanted) & (each != 0)  # zeros pad a short block
    if bool(odd.any()):
        raise SchemeError(
            f"an exact cast takes scales that differ by powers of two within each '{share}'; in "
            f"{int(odd.any(1).sum())} of {len(each)} they don't. scale=pow2-ratio makes such scales for what shares a "
            "real number in its scale_format, '(ufloat3_e3m0_finite channel floor=normal)'; so does scale=pow2."
        )
    shift = share.from_blocks(top - exponent, shape)
    wider = shifted_codes(codes, shift, found.format, wide)
    packed = get_layout("dense").pack(wider.reshape(-1), wide.bits)
    return BlockQTensor(wide, share, shape, packed, QuantParams(largest.reshape(share.scale_shape(shape)).clone()))
