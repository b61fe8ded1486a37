"""Quantization parameters as a module, so that they are stored, moved and, where wanted, trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams
from nybble.quantizer import Quantizer
from nybble.scales.one import One


def check_own_scales(name: str, quantizer: Quantizer, instead: str = "") -> None:
    """Raise SchemeError for a quantizer whose blocks have no scale of their own that could learn.

    Args:
        name: of the part.
        quantizer: what it is to learn.
        instead: a part that needs none.
    """
    if quantizer.granularity.factored or isinstance(quantizer.scale, One):
        raise SchemeError(
            f"{name} learns a scale for each block, and {quantizer} has none of its own; use tensor, channel, group, "
            f"block or flat with a scale{f', or {instead}' if instead else ''}."
        )


_PLAIN = ("scale", "zero_point", "offset", "thresholds", "grid", "shift")
_NESTED = ("scale_params", "offset_params")


class Held(nn.Module):
    """Raw parameters (:meth:`nybble.quantizer.Quantizer.soften`): float32 buffers, and parameters where they learn.

    Args:
        quantizer: whose.
        params: stored or raw.
        learn: names of those that training moves: ``scale``, ``zero_point``, ``offset`` ...

    Raises:
        SchemeError: a scale whose factors are quantized themselves.
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams, learn: Collection[str] = ()) -> None:
        super().__init__()
        raw = quantizer.soften(params)
        scale = raw.scale
        self._inverse, self._combine, self._factors = isinstance(scale, Inverse), "", 0
        if isinstance(scale, Factored):
            self._combine, self._factors = scale.combine, len(scale.factors)
            for i, factor in enumerate(scale.factors):
                if isinstance(factor, QTensor):
                    raise SchemeError(f"{quantizer}: factors of a scale that are quantized themselves can't be held.")
                self.register_buffer(f"factor_{i}", factor)
            scale = None
        for name in _PLAIN:
            value = getattr(raw, name) if name != "scale" else scale.divisor if isinstance(scale, Inverse) else scale
            assert value is None or isinstance(value, Tensor)
            if value is not None and name in learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        for name, inner in zip(_NESTED, (quantizer.scale_format, quantizer.offset_format), strict=True):
            nested = getattr(raw, name)
            held = Held(inner, nested) if isinstance(inner, Quantizer) and nested is not None else None
            self.add_module(name, held)

    def params(self) -> QuantParams:
        """The raw parameters over the current tensors."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        if self._factors:
            factors = tuple(self.get_buffer(f"factor_{i}") for i in range(self._factors))
            plain["scale"] = Factored(factors, self._combine)
        elif self._inverse:
            plain["scale"] = Inverse(plain["scale"])
        for name in _NESTED:
            held = self._modules[name]
            if isinstance(held, Held):
                plain[name] = held.params()
        return QuantParams(**plain)
