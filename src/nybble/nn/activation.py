"""Activations on their way into (or out of) a module: measured on every tensor, or with one calibrated scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError
from nybble.granularity import PerTensor, Shifted
from nybble.qtensor import Factored, QTensor, QuantParams, dense
from nybble.quantizer import Quantizer

_PARTS = ("scale", "zero_point", "offset", "shifts")


class ActivationQuantizer(nn.Module):
    """Fake-quantizes what passes.

    Args:
        quantizer: the specification; a static one is per tensor, or shifted.
        params: for a static quantizer: calibrated scale, zero point, offset, one value each; a shifted one's scale is
            Factored, and its columns' exponents are kept as integers (``shifts``, uint8).
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams | None = None) -> None:
        super().__init__()
        check_static(quantizer)
        if (params is None) == quantizer.static:
            raise FileError(f"{quantizer}: a static quantizer, and only that, comes with calibrated parameters.")
        self.quantizer = quantizer
        for part, value in _parts(params).items():
            self.register_buffer(part, value)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.quantizer.fake_quantize(x, self.params())

    def params(self) -> QuantParams | None:
        """The calibrated parameters; None where each tensor is measured."""
        if not self.quantizer.static:
            return None
        found, zero_point, offset, shifts = (self._buffers[part] for part in _PARTS)
        scale: Tensor | Factored | None = found
        if shifts is not None and found is not None:
            scale = Factored((found, torch.exp2(-shifts.float())))
        return QuantParams(scale, zero_point, offset)

    def _apply(self, fn: Any, recurse: bool = True) -> ActivationQuantizer:
        # Scales stay float32: only moves between devices pass.
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def roles(self) -> dict[str, str]:
        """For each name of the state dict: scales or offsets."""
        return {name: "scales" if name in ("scale", "shifts") else "offsets" for name in self.state_dict()}

    def to_dict(self) -> dict[str, object]:
        """Line and the names of static parameters, for config.json; with shifts, how many columns."""
        static = [part for part in _PARTS if getattr(self, part) is not None]
        shifts = self._buffers["shifts"]
        columns = {} if shifts is None else {"columns": shifts.numel()}
        return {"quantizer": str(self.quantizer), **({"static": static} if static else {}), **columns}

    @staticmethod
    def from_dict(data: dict[str, object]) -> ActivationQuantizer:
        """Inverse of :meth:`to_dict` with empty parameters, for a checkpoint to fill."""
        quantizer, static = Quantizer(str(data["quantizer"])), data.get("static", [])
        if not isinstance(static, list) or not set(static) <= set(_PARTS):
            raise FileError(
                f"static parameters of an activation quantizer are among {', '.join(_PARTS)}; got {static!r}."
            )
        found = {part: torch.empty(1) for part in static}
        if not found:
            return ActivationQuantizer(quantizer)
        scale: Tensor | Factored | None = found.get("scale")
        if "shifts" in found:
            columns = data["columns"]
            if not isinstance(columns, int) or isinstance(scale, Factored) or scale is None:
                raise FileError(f"shifts go with a scale and a number of columns; got {data!r}.")
            scale = Factored((scale, torch.empty(columns)))
        return ActivationQuantizer(quantizer, QuantParams(scale, found.get("zero_point"), found.get("offset")))

    def extra_repr(self) -> str:  # noqa: D102
        return str(self.quantizer)


def _parts(params: QuantParams | None) -> dict[str, Tensor | None]:
    """The buffers of static parameters."""
    found: dict[str, Tensor | None] = dict.fromkeys(_PARTS)
    if params is None:
        return found
    scale = params.scale
    if isinstance(scale, Factored):
        scale, powers = scale.factors
        found["shifts"] = dense(powers).reshape(-1).log2().neg().to(torch.uint8)
    for part, value in (("scale", scale), ("zero_point", params.zero_point), ("offset", params.offset)):
        if isinstance(value, Tensor | QTensor):
            found[part] = dense(value).reshape(1)
    return found


def check_static(quantizer: Quantizer) -> None:
    """Raise SchemeError for a static quantizer that one calibrated value can't serve."""
    fixed = type(quantizer.granularity) in (PerTensor, Shifted) and quantizer.scale_format == "float32"
    if quantizer.static and not fixed:
        raise SchemeError(
            f"{quantizer}: static activations have one float32 scale for the tensor; "
            "write 'tensor' or 'shifted', or leave out 'static'."
        )
