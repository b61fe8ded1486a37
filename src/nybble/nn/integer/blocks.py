"""Tensors of integers in blocks with a shift each, ``x = q 2^-t``, in the place of a transformer's tensors.

Source: BCT (Dong & Chen 2023, arXiv:2304.01483). A block is a strip of one row, so that a token's codes depend on no
other token and a cache's stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import ModelError
from nybble.nn.integer.shifts import bit_length, power_of_two, shift_right

FINEST, COARSEST = 127, -128
"""Shifts are stored in 8 bits. A block of zeros has the finest, so that no other is aligned to it."""


_ASKED = frozenset(("__get__", "size", "dim", "numel", "__repr__"))
"""What a model may ask of the codes: attributes, and these."""


class Blocks(Tensor):
    """Codes and the shifts of their strips.

    It is a tensor to models, which ask what they carry whether it is one. Their ``forward`` may view it, swap leading
    dimensions, pick from them, and add two; whatever else it asks torch for is an error.

    Attributes:
        codes: integers [..., n], int8, or float64 in a simulation.
        shifts: int8 [..., strips]. strip: its columns; the last one of a row may be short.
    """

    codes: Tensor
    shifts: Tensor
    strip: int

    def __new__(cls, codes: Tensor, shifts: Tensor, strip: int) -> Blocks:
        """As the attributes."""
        made = Tensor._make_subclass(cls, codes)
        made.codes, made.shifts, made.strip = codes, shifts, strip
        return made

    def __init__(self, codes: Tensor, shifts: Tensor, strip: int) -> None: ...

    # ---------------------------------------------------------------------------------------------------- values
    def each(self) -> Tensor:
        """int64 [..., n]: every code's shift."""
        return spread(self.shifts, self.strip, self.codes.shape[-1]).to(torch.int64)

    def wide(self) -> Tensor:
        """Codes to calculate with: int64 or float64."""
        return widened(self.codes)

    def float(self) -> Tensor:
        """The values, float32: where integers end."""
        return (self.codes.double() * power_of_two(-self.each())).float()

    def cut(self, strip: int) -> Blocks:
        """The same in strips of ``strip`` columns, which divides :attr:`strip`, or is it."""
        strips = -(-self.codes.shape[-1] // strip)
        return Blocks(self.codes, spread(self.shifts, self.strip // strip, strips), strip)

    # -------------------------------------------------------------------------------------------- as a tensor is asked
    def contiguous(self, *_: Any, **__: Any) -> Blocks:  # noqa: D102
        return self

    def view(self, *shape: Any) -> Blocks:
        """Rows cut or joined, in strips that fit both."""
        codes = self.codes.reshape(*shape)
        before, after = self.codes.shape[-1], codes.shape[-1]
        cut = self if before == after else self.cut(math.gcd(self.strip, before, after))
        return Blocks(codes, cut.shifts.reshape(*codes.shape[:-1], -1), cut.strip)

    reshape = view  # type: ignore[assignment]

    def transpose(self, first: int, second: int) -> Blocks:
        """Of leading dimensions: strips lie along the last."""
        if self.dim() - 1 in (first % self.dim(), second % self.dim()):
            raise ModelError("integers in blocks keep their last dimension, along which strips lie; it is transposed.")
        return Blocks(self.codes.transpose(first, second), self.shifts.transpose(first, second), self.strip)

    def split(self, size: int, dim: int = 0) -> tuple[Blocks, ...]:  # type: ignore[override]
        """Pieces of ``size`` columns, in strips that fit them."""
        if dim % self.dim() != self.dim() - 1:
            raise ModelError("integers in blocks are split along their last dimension only.")
        cut = self.cut(math.gcd(self.strip, size, self.shape[-1]))
        pieces = zip(torch.split(cut.codes, size, -1), torch.split(cut.shifts, size // cut.strip, -1), strict=True)
        return tuple(Blocks(codes, shifts, cut.strip) for codes, shifts in pieces)

    def to(self, *args: Any, **named: Any) -> Blocks:
        """On another device; integers have no other type."""
        if named or len(args) != 1 or not isinstance(args[0], torch.device | str):
            raise ModelError("integers in blocks are moved to a device, and to no other type.")
        return Blocks(self.codes.to(args[0]), self.shifts.to(args[0]), self.strip)

    def __getitem__(self, index: Any) -> Blocks:
        used = list(index) if isinstance(index, tuple) else [index]
        while used and isinstance(used[-1], slice) and used[-1] == slice(None):
            used.pop()
        if len(used) >= self.dim() or any(part is Ellipsis or part is None for part in used):
            raise ModelError("integers in blocks can be picked from along leading dimensions only.")
        return Blocks(self.codes[tuple(used)], self.shifts[tuple(used)], self.strip)

    def __add__(self, other: Any) -> Blocks:
        if not isinstance(other, Blocks):
            raise ModelError(f"integers in blocks are added to others, not to a {type(other).__name__}.")
        return added(self, other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is functional.dropout and not given.get("training", args[2] if len(args) > 2 else True):
            return args[0]
        if func is torch.cat:
            return joined([part for part in args[0] if isinstance(part, Blocks)], given.get("dim", -2))
        name = getattr(func, "__name__", str(func))
        if name in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        raise ModelError(
            f"integers in blocks can't follow {name}; they know quantized embeddings and layers, layer norms, "
            "activations that are modules, attention by transformers' interface, and sums."
        )


def widened(codes: Tensor) -> Tensor:
    """Codes to calculate with: int64, or float64 as they are."""
    return codes if codes.is_floating_point() else codes.to(torch.int64)


def spread(values: Tensor, size: int, columns: int) -> Tensor:
    """A value a strip of ``size``, [..., strips] -> a value a column, [..., columns]."""
    return values if size == 1 else values.repeat_interleave(size, -1)[..., :columns]


def in_strips(x: Tensor, size: int, fill: int = 0) -> Tensor:
    """[..., n] -> [..., strips, size], the last strip filled up."""
    short = -x.shape[-1] % size
    padded = torch.constant_pad_nd(x, (0, short), fill) if short else x
    return padded.view(*padded.shape[:-1], -1, size)


def narrow(q: Tensor, shifts: Tensor, strip: int, bits: int = 8) -> Blocks:
    """Wide integers as codes of few bits: a strip's shift is the finest with which its largest value fits.

    ``t = (bits - 2) - floor(log2 max |x|)``; what rounds up to ``2^(bits-1)`` is a step smaller. A code narrowed again
    stays itself.

    Args:
        q: integers [..., n], int64 or held in float64; magnitudes below 2^60.
        shifts: of them, integers of a shape that meets ``q``'s.
        strip: columns of a strip.
        bits: at most 16.
    """
    columns, top = q.shape[-1], 2 ** (bits - 1) - 1
    own = torch.where(q == 0, FINEST, shifts.to(torch.int64)).expand(q.shape)
    coarsest = in_strips(own, strip, FINEST).amin(-1)
    q = shift_right(q, own - spread(coarsest, strip, columns))
    found = (coarsest - bit_length(in_strips(q.abs(), strip).amax(-1)) + bits - 1).clamp(COARSEST, FINEST)
    codes = shift_right(q, spread(coarsest - found, strip, columns)).clamp(-top, top)
    kept = codes if q.is_floating_point() else codes.to(torch.int8 if bits <= 8 else torch.int16)
    return Blocks(kept, found.to(torch.int8), strip)


_FINER = 8


def added(x: Blocks, y: Blocks) -> Blocks:
    """A sum, narrowed: both are shifted to 8 bits below the codes of the coarser one, strip by strip."""
    strip = math.gcd(x.strip, y.strip)
    x, y = x.cut(strip), y.cut(strip)
    shifts = torch.minimum(x.each(), y.each()) + _FINER
    total = shift_right(x.wide(), x.each() - shifts) + shift_right(y.wide(), y.each() - shifts)
    return narrow(total, shifts, strip)


def joined(parts: Sequence[Blocks], dim: int) -> Blocks:
    """Put together along a leading dimension, or along the last where strips are whole."""
    strip = math.gcd(*(part.strip for part in parts))
    cut = [part.cut(strip) for part in parts]
    return Blocks(torch.cat([part.codes for part in cut], dim), torch.cat([part.shifts for part in cut], dim), strip)
