"""Linear layers: ``nn.Linear``, and transformers' ``Conv1D`` (GPT-2), which keeps [in, out]."""

from __future__ import annotations

from torch import Tensor, nn

from nybble.nn.kinds import Get, LayerKind, Quantized
from nybble.nn.linear import QuantLinear
from nybble.nn.plain import computes_as, known_as
from nybble.nn.rotation import rotation_of
from nybble.qtensor import QTensor

CONV1D = frozenset({"transformers.pytorch_utils.Conv1D"})
# Their own forwards are nn.Linear's in other words: Falcon's adds the bias last, timm's casts where it is scripted.
KNOWN = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear", "timm.layers.linear.Linear"})


class Linear(LayerKind):
    """``x @ W^T + b`` for each row x."""

    entry = "linear"
    classes = ("Linear",)
    stand_ins = (QuantLinear,)
    by_rows = True

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        plain = computes_as(module, (nn.Linear,)) or known_as(module, KNOWN | CONV1D)
        return plain and rotation_of(module) is None

    def resembles(self, module: nn.Module) -> bool:  # noqa: D102
        return isinstance(module, nn.Linear)

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight").T if is_conv1d(module) else get("weight")

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix.T if is_conv1d(module) else matrix}

    def stand_in(  # noqa: D102
        self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized
    ) -> QuantLinear:
        return QuantLinear(weight, bias, made.inputs, made.outputs)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``."""
    return known_as(module, CONV1D)


PART = Linear()
