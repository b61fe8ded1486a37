"""A quantized tensor plus a product of two thin ones (LoRC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.core.errors import FileError
from nybble.core.explicit import no_autocast
from nybble.qtensor import QTensor, Spec, dense, from_spec, named_tensors, stored_tensor, sub_tensors, validate_all


@dataclass(frozen=True)
class LowRankSum(QTensor):
    """``x_hat = base + a @ b``: low-rank compensation of what quantization lost (LoRC).

    Attributes:
        base: QTensor [..., out, in]. a: [..., out, r], b: [..., r, in]; plain or quantized.
    """

    base: QTensor
    a: Tensor | QTensor
    b: Tensor | QTensor
    kind = "low-rank-sum"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the sum."""
        return self.base.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # noqa: D102
        a, b = dense(self.a), dense(self.b)
        with no_autocast(a.device):  # a caller's would round the product to 16 bits
            return (self.base.dequantize() + a @ b).to(dtype)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = named_tensors("base", self.base)
        for name, part in (("a", self.a), ("b", self.b)):
            found |= named_tensors(name, part) if isinstance(part, QTensor) else {name: part}
        return found

    def roles(self) -> dict[str, str]:  # noqa: D102
        found = {f"base.{k}": role for k, role in self.base.roles().items()}
        for name, part in (("a", self.a), ("b", self.b)):
            found |= (
                {f"{name}.{k}": r for k, r in part.roles().items()}
                if isinstance(part, QTensor)
                else {name: "unquantized"}
            )
        return found

    def spec(self) -> Spec:  # noqa: D102
        sides = {
            n: p.spec() if isinstance(p, QTensor) else {"kind": "plain"} for n, p in (("a", self.a), ("b", self.b))
        }
        return {"kind": self.kind, "base": self.base.spec(), **sides}

    def to(self, device: torch.device | str) -> LowRankSum:  # noqa: D102
        return self.rebuild(self.spec(), {k: t.to(device) for k, t in self.tensors().items()})

    def validate(self) -> None:  # noqa: D102
        validate_all({"base": self.base, "a": self.a, "b": self.b})

    @staticmethod
    def rebuild(spec: Spec, tensors: Mapping[str, Tensor]) -> LowRankSum:
        """From :meth:`spec` and :meth:`tensors`."""
        base = from_spec(spec["base"], sub_tensors(tensors, "base"))
        a, b = (
            stored_tensor(tensors, n) if spec[n]["kind"] == "plain" else from_spec(spec[n], sub_tensors(tensors, n))
            for n in ("a", "b")
        )
        if a.shape[-1] != b.shape[-2] or a.shape[-2] != base.shape[-2] or b.shape[-1] != base.shape[-1]:
            raise FileError(
                f"low-rank factors {list(a.shape)} and {list(b.shape)} do not fit a tensor {list(base.shape)}."
            )
        return LowRankSum(base, a, b)


PART = LowRankSum
