"""Linear layers: ``nn.Linear`` and its children, and transformers' ``Conv1D`` (GPT-2), which keeps [in, out]."""

from __future__ import annotations

from torch import Tensor, nn

from nybble.nn.kinds import Get, LayerKind, Quantized
from nybble.nn.linear import QuantLinear
from nybble.qtensor import QTensor


class Linear(LayerKind):
    """``x @ W^T + b`` for each row x."""

    entry = "linear"
    classes = ("Linear",)
    stand_ins = (QuantLinear,)
    by_rows = True

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        known = isinstance(module, nn.Linear) or is_conv1d(module)
        return known and isinstance(getattr(module, "weight", None), Tensor)

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight").T if is_conv1d(module) else get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix.T if is_conv1d(module) else matrix}

    def stand_in(  # noqa: D102
        self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized
    ) -> QuantLinear:
        return QuantLinear(weight, bias, made.inputs, made.outputs)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, known by name since transformers need not be there."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


PART = Linear()
