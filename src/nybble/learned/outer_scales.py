"""Outer scales: the scale of the scales learns (NVFP4's global one, those of double quantization), all below follows.

    w_hat = S s v,              S' = S exp(t),   dw_hat/dt = S' s v      s, v what the codes of scale and element mean
    w_hat = (S s + m) v,        m' = m + S u,    dw_hat/du = S v             with a mean m of the scales

NVFP4 (E4M3 scales over one float32), QLoRA's double quantization (8-bit scales in blocks of 256 around their mean),
FP4-M2 (powers of two times one number a row), an MX format over a scale of each row: any quantizer whose scales or
offsets have a quantizer of their own. Parts that learn a block's scale (``frozen-codes``, ``block-ap``) hold what is
above it; here that is what learns, by default alone:

``codes``   ``rounded``: elements are rounded anew under the scales that come of it, with the gradient of LSQ (Esser et
            al. 2020, arXiv:1902.08153: v - w / s inside the range); ``fixed``: they stay, a solver's own too.
``inner``   ``fixed``: codes of the scales stay, so that all blocks under one outer scale grow together; ``learned``:
            each also has a factor exp(r) of its own, and is rounded anew.

No paper's method: what "Outer scales" of block formats calls for, in the form that these parts have. A factor for each
row or column above *any* format, whether it has such a scale or not, is ``binarization-scales``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import WEIGHTS, Learned, Part
from nybble.learned._held import Held
from nybble.ops.grid import Grid
from nybble.qtensor import Inverse, QTensor, QuantParams, block_view
from nybble.quantizer import Quantizer
from nybble.scales.one import One

_SIDES = ("scale", "offset")


class Outer(Learned):
    """See the module.

    Args:
        quantizer: whose scales or offsets have a quantizer of their own.
        x: the weight, whose codes may stay.
        params: to begin with.
        options: of the part.
    """

    nearest = False

    def __init__(self, quantizer: Quantizer, x: Tensor, params: QuantParams, options: OuterScales) -> None:
        super().__init__(quantizer, WEIGHTS)
        self.options = options
        self.held = Held(quantizer, params)
        start = self.held.params()
        for side in _SIDES:
            inner, outer = _outer(quantizer, side), getattr(start, f"{side}_params")
            if inner is None or outer is None:
                continue
            if options.inner == "learned":
                self.register_parameter(f"{side}_own", nn.Parameter(torch.zeros_like(getattr(start, side))))
            scale = outer.scale.divisor if isinstance(outer.scale, Inverse) else outer.scale
            self.register_parameter(f"{side}_grown", nn.Parameter(torch.zeros_like(scale)))
            if outer.offset is not None:
                self.register_parameter(f"{side}_moved", nn.Parameter(torch.zeros_like(outer.offset)))
        codes = None
        if options.codes == "fixed":
            codes = quantizer.quantize(x, quantizer.harden(start)).unpacked()
        self.codes: Tensor | None
        self.register_buffer("codes", codes)

    def params(self) -> QuantParams:
        """Raw parameters, with gradients to what learns."""
        found = self.held.params()
        for side in _SIDES:
            grown = self._parameters.get(f"{side}_grown")
            inner, outer = _outer(self.quantizer, side), getattr(found, f"{side}_params")
            if grown is None or inner is None:
                continue
            raw, own = getattr(found, side), self._parameters.get(f"{side}_own")
            after = _after(outer, grown, self._parameters.get(f"{side}_moved"))
            raw = _carried(inner, raw, outer, after, grown)
            changed: dict[str, Any] = {
                side: raw if own is None else raw * own.exp(),
                f"{side}_params": _detached(after),  # which has its gradient through the scales
            }
            found = replace(found, **changed)
        return found

    def _decided(self, y: Tensor, grid: Grid) -> Tensor:
        assert self.codes is not None
        return grid.decode(self.quantizer.granularity.to_blocks(self.codes))

    def estimate(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.quantizer.soft(x.detach(), self.params(), None if self.codes is None else self._decided)

    @torch.no_grad()
    def settle(self, x: Tensor) -> QTensor:  # noqa: D102
        if self.codes is not None:
            return self.quantizer.pack(self.codes, self.params())
        return self.quantizer.quantize(x, self.quantizer.harden(self.params()))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """``outer``: all of it, in units of what the scales are."""
        return {"outer": list(self.parameters())}


def _outer(quantizer: Quantizer, side: str) -> Quantizer | None:
    """What quantizes the scales (or offsets), if that has a scale of its own."""
    inner = getattr(quantizer, f"{side}_format")
    usable = isinstance(inner, Quantizer) and not (isinstance(inner.scale, One) or inner.granularity.factored)
    return inner if usable else None


def _after(outer: QuantParams, grown: Tensor, moved: Tensor | None) -> QuantParams:
    """Parameters of the scales' own quantizer as they are by now."""
    size: Tensor
    if isinstance(outer.scale, Inverse):
        found = replace(outer, scale=Inverse(outer.scale.divisor * (-grown).exp()))
        size = 1 / outer.scale.divisor
    else:
        assert isinstance(outer.scale, Tensor)
        found, size = replace(outer, scale=outer.scale * grown.exp()), outer.scale
    if moved is None:
        return found
    assert isinstance(outer.offset, Tensor)
    return replace(found, offset=outer.offset + size * moved)


def _carried(inner: Quantizer, raw: Tensor, outer: QuantParams, after: QuantParams, grown: Tensor) -> Tensor:
    """Raw scales whose codes stay those under ``outer``; the gradient is that of their stored values.

    float32, the shape of ``raw``.
    """
    shape, granularity = tuple(raw.shape), inner.granularity
    factor = block_view(grown.exp(), granularity, shape)
    blocks = granularity.to_blocks(raw)
    before = 0.0 if outer.offset is None else _view(outer.offset, inner, shape)
    now = 0.0 if after.offset is None else _view(after.offset, inner, shape)
    there = ((blocks - before) * factor + now).detach()
    stored = granularity.to_blocks(inner.soft(granularity.from_blocks(there, shape), _detached(after)).detach())
    # In value nothing is added; backwards, what the stored scale would follow: S' s + m'.
    bare = stored - (now.detach() if isinstance(now, Tensor) else now)
    through = bare * (factor / factor.detach()) - bare + (now - now.detach() if isinstance(now, Tensor) else 0.0)
    return granularity.from_blocks(there + through, shape)


def _view(offset: Tensor | QTensor, inner: Quantizer, shape: tuple[int, ...]) -> Tensor:
    return block_view(offset, inner.granularity, shape)


def _detached(params: QuantParams) -> QuantParams:
    scale = params.scale
    scale = Inverse(scale.divisor.detach()) if isinstance(scale, Inverse) else scale
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    offset = params.offset.detach() if isinstance(params.offset, Tensor) else params.offset
    return replace(params, scale=scale, offset=offset)


@dataclass(frozen=True, kw_only=True)
class OuterScales(Part):
    """Options of the method.

    Attributes:
        codes: whether elements are ``rounded`` anew or stay ``fixed``.
        inner: whether codes of the scales stay ``fixed``, or the scales are ``learned`` too.
    """

    codes: Literal["rounded", "fixed"] = "rounded"
    inner: Literal["fixed", "learned"] = "fixed"

    sides = (WEIGHTS,)
    groups = ("outer",)
    fixes_x = True

    @property
    def keeps_codes(self) -> bool:  # type: ignore[override]
        """Whether a solver's codes stay."""
        return self.codes == "fixed"

    def check_more(self, quantizer: Quantizer, side: str) -> None:  # noqa: D102
        if all(_outer(quantizer, which) is None for which in _SIDES):
            raise SchemeError(
                f"outer-scales learns the scale that other scales have, and {quantizer} ({quantizer.format.name}) has "
                "none; nvfp4, nf4-dq and fp4-m2 do, and any line with scale_format=(...) in parentheses that isn't "
                "scale=one. For factors of rows or columns above any other format use binarization-scales, for the "
                "scales themselves frozen-codes."
            )

    def begin(self, quantizer: Quantizer, x: Tensor, start: QuantParams | None, side: str) -> Learned:  # noqa: D102
        return Outer(quantizer, x, quantizer.measured(x, start), self)


PART = OuterScales
