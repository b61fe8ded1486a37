"""Static quantizers of layers as integers: scale, zero point, ends; and the one operation in float, at the entrance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import SchemeError
from nybble.nn.activation import ActivationQuantizer
from nybble.qtensor import dense

NEAREST = "int8 static, uint8 symmetric=false static"


@dataclass(frozen=True)
class Grid:
    """Codes counted from the zero point, from ``low`` to ``high``, times ``scale`` (a float32)."""

    scale: float
    low: int
    high: int

    @staticmethod
    def of(name: str, quantizer: ActivationQuantizer | None) -> Grid:
        """Of what enters a layer.

        Raises:
            SchemeError: it isn't rounded to integers with one calibrated scale.
        """
        params = None if quantizer is None else quantizer.params()
        if quantizer is None or params is None or not quantizer.whole or not isinstance(params.scale, Tensor):
            came = "stays in float" if quantizer is None else f"is {quantizer.quantizer}"
            raise SchemeError(
                f"{name}: what enters it {came}; integers alone need one calibrated scale. Quantize with "
                f"--activations as one of: {NEAREST}."
            )
        zero = 0 if params.zero_point is None else int(dense(params.zero_point))
        form = quantizer.quantizer.format
        return Grid(float(params.scale.reshape(())), round(form.min) - zero, round(form.max) - zero)

    def codes(self, x: Tensor) -> Tensor:
        """Of floats, in int32, as the quantizer rounds."""
        return torch.round(x.float() / self.scale).clamp(self.low, self.high).to(torch.int32)
