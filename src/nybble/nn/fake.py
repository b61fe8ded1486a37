"""The trainable twin of a quantized layer: float32 weight, learned quantizers, the same numbers.

Reconstruction, quantization-aware training, sensitivities and searches all put a :class:`FakeLayer` where the float
layer stood. Its product is the quantized layer's own (:class:`nybble.nn.layer.QuantLayer`), of a dense weight, so
that casts happen at the same places: in eval mode ``fake(x) == fake.settle()(x)``, bit for bit, in any dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import SchemeError
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned
from nybble.learned.ste import StraightThrough
from nybble.nn.activation import ActivationQuantizer, check_static
from nybble.nn.kinds import LayerKind, Quantized, kind_of, live
from nybble.nn.layer import QuantLayer, widened
from nybble.nn.swap import set_module
from nybble.nn.twin import FakeWeight, Twin, settled_activation
from nybble.qtensor import QTensor


class FakeLayer(Twin):
    """Stands for a linear layer, GPT-2's ``Conv1D``, a convolution or another kind of layer while something is learned.

    Attributes that a model may ask of its layers (``in_features``, ``kernel_size`` ...) are the quantized layer's.
    Everything in it stays float32 when the model is cast; ``dtype``, the packed layer's, follows the model.

    Args:
        like: the float layer; only its kind and sizes are kept. Its bias is copied.
        latent: float32 [out, in], the layer's matrix (:meth:`nybble.nn.kinds.Kind.matrix`); None copies its own.
        weights: learned quantizer of the weight (a :class:`~nybble.learned.Menu` for a search); None leaves it in
            float.
        inputs: of what enters; None leaves it. A calibrated quantizer is kept as it is and passes gradients straight
            through.
        outputs: of what leaves, likewise.
        trainable: whether gradients reach weight and bias.
        folded: full name of a BatchNorm that is in weight and bias now.

    Attributes:
        rounds_inputs: whether inputs are rounded in training mode too; in eval mode they always are.

    Raises:
        SchemeError: ``like`` is no layer with one matrix, or a Learned is for the other side.
    """

    dtype: torch.dtype
    rounds_inputs = True

    def __init__(
        self,
        like: nn.Module,
        latent: Tensor | None = None,
        weights: Learned | None = None,
        inputs: Learned | ActivationQuantizer | None = None,
        outputs: Learned | ActivationQuantizer | None = None,
        *,
        trainable: bool = True,
        folded: str = "",
    ) -> None:
        super().__init__()
        kind = kind_of(like)
        if not isinstance(kind, LayerKind):
            raise SchemeError(f"a {type(like).__name__} is no layer with one matrix to learn; leave it out (ignore).")
        matrix = kind.matrix(like, "", live(like))
        inputs, outputs = _learned(inputs), _learned(outputs)
        for learned, side in ((weights, WEIGHTS), (inputs, ACTIVATIONS), (outputs, ACTIVATIONS)):
            if learned is not None and learned.side != side:
                raise SchemeError(f"{learned.quantizer} is learned for {learned.side}, and stands for {side} here.")
        for quantizer in (q.quantizer for q in (inputs, outputs) if q is not None):
            check_static(quantizer)
        bias = getattr(like, "bias", None)
        self.weight = FakeWeight(
            matrix.detach().float().clone() if latent is None else latent, weights, trainable=trainable
        )
        self.bias = None
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=trainable)
        self.inputs, self.outputs = inputs, outputs
        self.take_dtype(next(like.parameters()).dtype)
        self.folded = folded
        # In tuples, so that they are no part of the state: an empty copy of the float layer, and its quantized layer
        # (behind a rotation, which comes before the inputs are rounded, the one without).
        self._like = (kind, _empty(like))
        meta = torch.empty(matrix.shape, dtype=self.dtype, device="meta")
        self._layer = (self._stand_in(meta, None, Quantized(folded=folded), rotated=False),)

    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer."""
        kind, like = self._like
        x = kind.enters(like, widened(x, self.dtype))
        if self.inputs is not None and (self.rounds_inputs or not self.training):
            x = self.inputs(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = self._layer[0].product(x, self.weight(x.dtype), bias)
        return y if self.outputs is None else self.outputs(y)

    def settle_in(self, root: nn.Module, name: str) -> None:  # noqa: D102
        set_module(root, name, self.settle())

    def settle(self) -> QuantLayer:
        """The packed layer; nothing is shared with this one."""
        bias = None if self.bias is None else self.bias.detach().to(self.dtype, copy=True)
        inputs, outputs = (None if q is None else settled_activation(q) for q in (self.inputs, self.outputs))
        made = Quantized(inputs=inputs, outputs=outputs, folded=self.folded)
        layer = self._stand_in(self.weight.settle(self.dtype), bias, made)
        return layer.standing_for(self.dtype).train(self.training)

    def _stand_in(
        self, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized, rotated: bool = True
    ) -> QuantLayer:
        """The quantized layer of this kind."""
        kind, like = self._like
        part = kind if rotated else kind.unrotated
        assert isinstance(part, LayerKind)
        return part.stand_in(like, weight, bias, made)

    def float_values(self) -> dict[str, Tensor]:  # noqa: D102
        kind, like = self._like
        found = kind.values(like, "", self.weight.latent.detach())
        return found if self.bias is None else {**found, "bias": self.bias.detach()}

    def learned(self) -> list[tuple[str, Learned]]:  # noqa: D102
        found = (("weights", self.weight.learned), ("inputs", self.inputs), ("outputs", self.outputs))
        return [(name, learned) for name, learned in found if learned is not None]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_layer")
            if layer is None or name.startswith("_"):
                raise
            return getattr(layer[0], name)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self._layer[0].extra_repr()}, {self.dtype}"


def penalty_of(root: nn.Module, t: float) -> Tensor:
    """Sum of the penalties of all twins in ``root`` at progress ``t``, 0 to 1; float32 scalar."""
    twins = [module for module in root.modules() if isinstance(module, Twin)]
    found = [twin.penalty(t) for twin in twins if next(twin.parameters(), None) is not None]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float32)


def _empty(like: nn.Module) -> nn.Module:
    """The layer without its numbers: shapes and settings only."""
    shell = copy.copy(like)
    shell._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in like._parameters.items()
    }
    return shell


def _learned(given: Learned | ActivationQuantizer | None) -> Learned | None:
    """A Learned, or one that stands for a quantizer without gradients."""
    if isinstance(given, ActivationQuantizer):
        return StraightThrough(given.quantizer, ACTIVATIONS, given.params())
    return given
