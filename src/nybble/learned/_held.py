"""Quantization parameters as a module, so that they are stored, moved and, where wanted, trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.qtensor import Factored, Inverse, QTensor, QuantParams
from nybble.quantizer import Quantizer

_PLAIN = ("scale", "zero_point", "offset", "thresholds", "grid")


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
        self._combine, self._inverse, scale = "", isinstance(raw.scale, Inverse), raw.scale
        if isinstance(scale, Factored):
            self._combine = scale.combine
            for i, factor in enumerate(scale.factors):
                if isinstance(factor, QTensor):
                    raise SchemeError(f"{quantizer}: factors of a scale that are quantized themselves can't be held.")
                self.register_buffer(f"factor_{i}", factor)
        self._factors = len(scale.factors) if isinstance(scale, Factored) else 0
        plain = scale.divisor if isinstance(scale, Inverse) else scale
        for name in _PLAIN:
            value = plain if name == "scale" else getattr(raw, name)
            if isinstance(value, Tensor) and name in learn:
                self.register_parameter(name, nn.Parameter(value))
            elif value is None or isinstance(value, Tensor):
                self.register_buffer(name, value)
        for name, inner in (("scale_params", quantizer.scale_format), ("offset_params", quantizer.offset_format)):
            nested = getattr(raw, name)
            held = Held(inner, nested) if isinstance(inner, Quantizer) and nested is not None else None
            self.add_module(name, held)

    def params(self) -> QuantParams:
        """The raw parameters over the current tensors."""
        plain = {name: getattr(self, name, None) for name in _PLAIN}
        found = QuantParams(**plain)
        if self._factors:
            factors = tuple(self.get_buffer(f"factor_{i}") for i in range(self._factors))
            found = replace(found, scale=Factored(factors, self._combine))
        elif self._inverse:
            found = replace(found, scale=Inverse(plain["scale"]))
        for name in ("scale_params", "offset_params"):
            held = self._modules[name]
            if isinstance(held, Held):
                found = replace(found, **{name: held.params()})
        return found
