"""Activations on their way into (or out of) a module: measured on every tensor, or with one calibrated scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError, SchemeError
from nybble.granularity import PerTensor
from nybble.qtensor import QuantParams, dense
from nybble.quantizer import Quantizer

_PARTS = ("scale", "zero_point", "offset")


class ActivationQuantizer(nn.Module):
    """Fake-quantizes what passes.

    Args:
        quantizer: the specification; a static one is per tensor.
        params: for a static quantizer: calibrated scale, zero point, offset, one value each.
    """

    def __init__(self, quantizer: Quantizer, params: QuantParams | None = None) -> None:
        super().__init__()
        check_static(quantizer)
        if (params is None) == quantizer.static:
            raise FileError(f"{quantizer}: a static quantizer, and only that, comes with calibrated parameters.")
        self.quantizer = quantizer
        for part in _PARTS:
            value = None if params is None else getattr(params, part)
            self.register_buffer(part, None if value is None else dense(value).reshape(1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not self.quantizer.static:
            return self.quantizer.fake_quantize(x)
        return self.quantizer.fake_quantize(x, QuantParams(*(self._buffers[part] for part in _PARTS)))

    def _apply(self, fn: Any, recurse: bool = True) -> ActivationQuantizer:
        # Scales stay float32: only moves between devices pass.
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def to_dict(self) -> dict[str, object]:
        """Line and the names of static parameters, for config.json."""
        static = [part for part in _PARTS if getattr(self, part) is not None]
        return {"quantizer": str(self.quantizer), **({"static": static} if static else {})}

    @staticmethod
    def from_dict(data: dict[str, object]) -> ActivationQuantizer:
        """Inverse of :meth:`to_dict` with empty parameters, for a checkpoint to fill."""
        quantizer, static = Quantizer(str(data["quantizer"])), data.get("static", [])
        if not isinstance(static, list) or not set(static) <= set(_PARTS):
            raise FileError(
                f"static parameters of an activation quantizer are among {', '.join(_PARTS)}; got {static!r}."
            )
        found = {part: torch.empty(1) for part in static}
        return ActivationQuantizer(
            quantizer, QuantParams(found.get("scale"), found.get("zero_point"), found.get("offset")) if found else None
        )

    def extra_repr(self) -> str:  # noqa: D102
        return str(self.quantizer)


def check_static(quantizer: Quantizer) -> None:
    """Raise SchemeError for a static quantizer that one calibrated value can't serve."""
    if quantizer.static and (type(quantizer.granularity) is not PerTensor or quantizer.scale_format != "float32"):
        raise SchemeError(
            f"{quantizer}: static activations have one float32 scale for the tensor; "
            "write 'tensor', or leave out 'static'."
        )
