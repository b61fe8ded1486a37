"""A quantized tensor times factors that broadcast against it: one for each row, one for each column (PTQ1.61)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.qtensor import (
    QTensor,
    Spec,
    broadcasts,
    dense,
    from_spec,
    named_tensors,
    stored_tensor,
    sub_tensors,
    validate_all,
)


@dataclass(frozen=True)
class OuterScaled(QTensor):
    """``x_hat = base * factor * factor ...``, offsets and all.

    A factored scale (:class:`nybble.qtensor.Factored`) belongs to the codes alone; these multiply what the base gives,
    whatever it is.

    Attributes:
        base: any QTensor.
        factors: one or more, of as many dimensions as the base, each 1 or the base's; plain or quantized.
    """

    base: QTensor
    factors: tuple[Tensor | QTensor, ...]
    kind = "outer-scaled"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the base."""
        return self.base.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        values = self.base.dequantize()
        for factor in self.factors:
            values = values * dense(factor)
        return values.to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = named_tensors("base", self.base)
        for i, factor in enumerate(self.factors):
            found |= named_tensors(f"factor.{i}", factor) if isinstance(factor, QTensor) else {f"factor.{i}": factor}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        base = {f"base.{name}": role for name, role in self.base.roles().items()}
        return {name: base.get(name, "scales") for name in self.tensors()}

    def padding_bytes(self) -> dict[str, int]:  # noqa: D102
        return self.base.padding_bytes()

    def spec(self) -> Spec:  # noqa: D102
        factors = [f.spec() if isinstance(f, QTensor) else {"kind": "plain"} for f in self.factors]
        return {"kind": self.kind, "base": self.base.spec(), "factors": factors}

    def to(self, device: torch.device | str) -> OuterScaled:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    def validate(self) -> None:  # noqa: D102
        validate_all({"base": self.base, **{f"factor.{i}": factor for i, factor in enumerate(self.factors)}})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> OuterScaled:
        """From :meth:`spec` and :meth:`tensors`."""
        base = from_spec(spec["base"], sub_tensors(tensors, "base"))
        factors: list[Tensor | QTensor] = []
        for i, part in enumerate(spec["factors"]):
            name = f"factor.{i}"
            plain = part["kind"] == "plain"
            factors.append(stored_tensor(tensors, name) if plain else from_spec(part, sub_tensors(tensors, name)))
            shape = tuple(factors[-1].shape)
            if not broadcasts(shape, base.shape):
                raise FileError(f"{name}: factors {list(shape)} don't fit a tensor {list(base.shape)}.")
        if not factors or any(isinstance(f, Tensor) and not f.is_floating_point() for f in factors):
            raise FileError("an outer-scaled tensor has one factor or more, of floating-point numbers.")
        return OuterScaled(base, tuple(factors))


PART = OuterScaled
