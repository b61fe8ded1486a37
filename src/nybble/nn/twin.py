"""What stands for quantized modules while their numbers are learned: twins, and the float32 weights in them.

A twin computes what the quantized module will, with gradients: in eval mode ``twin(x)`` and the module that
:meth:`Twin.settle_in` puts in its place give the same bits. Which twin stands for what is said by the kinds of modules
(:meth:`nybble.nn.kinds.Kind.put_twin`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.learned import Learned
from nybble.nn.activation import ActivationQuantizer
from nybble.qtensor import QTensor


class Twin(nn.Module, ABC):
    """Stands for something quantized. Everything in it stays float32 when the model is cast.

    Attributes:
        dtype: of the module that it stands for, which follows the model; None where that has none.
        reads_another: it settles after the others, one of which it reads.
    """

    dtype: torch.dtype | None = None
    reads_another: ClassVar[bool] = False

    @abstractmethod
    def learned(self) -> list[tuple[str, Learned]]:
        """The learned quantizers that there are, by what they round: ``weights``, ``inputs``, ``matmuls`` ..."""

    @abstractmethod
    def settle_in(self, root: nn.Module, name: str) -> None:
        """Put what training came to where this stands, in ``root`` as ``name``; nothing is shared with this one."""

    def float_values(self) -> dict[str, Tensor]:
        """Its own float32 weights, detached, by the names that the float module has for them; of operands none."""
        return {}

    def weights(self) -> list[FakeWeight]:
        """The weights that are its own."""
        return [module for module in self.modules() if isinstance(module, FakeWeight)]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters by learning-rate group: ``weight``, ``bias``, ``weights.scales``, ``inputs.scales`` ..."""
        latent, bias = [weight.latent for weight in self.weights()], self._parameters.get("bias")
        found = {"weight": latent} if latent else {}
        if bias is not None:
            found["bias"] = [bias]
        for role, learned in self.learned():
            for name, parameters in learned.groups().items():
                found.setdefault(f"{role}.{name}", []).extend(parameters)
        return found

    def penalty(self, t: float | Tensor) -> Tensor:
        """Sum of its learned quantizers' penalties at progress ``t``, 0 to 1."""
        begin = torch.zeros((), dtype=torch.float32, device=self._device)
        return sum((learned.penalty(t) for _, learned in self.learned()), begin)

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Stand for a module in another dtype."""
        self.dtype = dtype
        for weight in self.weights():
            weight.dtype = dtype

    @property
    def _device(self) -> torch.device:
        held = next(self.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def _apply(self, fn: Any, recurse: bool = True) -> Twin:
        if self.dtype is not None:
            self.take_dtype(fn(torch.empty(0, dtype=self.dtype, device=self._device)).dtype)

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class FakeWeight(nn.Module):
    """The one float32 truth of a weight, and what learns to round it.

    A module and no tensor, as in quantized layers: models that look at a weight's dtype then do the same with both.

    Args:
        latent: float32 [out, in]; kept without a copy.
        learned: None leaves the weight in float.
        trainable: whether gradients reach ``latent``.

    Attributes:
        dtype: of the weight that it stands for, which models ask for; float32 until its twin says.
        instead: gives the weight in place of :meth:`dense`, while there is one: of a step that rounds once for several
            forwards.
    """

    def __init__(self, latent: Tensor, learned: Learned | None, *, trainable: bool) -> None:
        super().__init__()
        self.latent = nn.Parameter(latent, requires_grad=trainable)
        self.learned = learned
        self.dtype = torch.float32
        self.instead: Callable[[FakeWeight, torch.dtype], Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.latent.shape

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight to multiply with."""
        return self.dense(dtype) if self.instead is None else self.instead(self, dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Rounded in float32, then cast, as ``QTensor.dequantize`` does."""
        dense: Tensor = self.latent.to(dtype) if self.learned is None else self.learned(self.latent, dtype)
        return dense

    def rows(self, ids: Tensor, dtype: torch.dtype, padding: int | None = None) -> Tensor:
        """Some rows of the weight: int64 [...] -> [..., in]; the row ``padding`` gets no gradient from them."""
        if self.instead is not None or self.learned is None:
            return functional.embedding(ids, self(dtype), padding)
        return self.learned.lookup(self.latent, ids, padding).to(dtype)

    def settle(self, dtype: torch.dtype) -> QTensor | Tensor:
        """Packed, or in ``dtype`` where nothing rounds it."""
        return self.latent.detach().to(dtype) if self.learned is None else self.packed()

    def packed(self) -> QTensor:
        """What training came to, of a weight that is rounded."""
        assert self.learned is not None
        settled = self.learned.settle(self.latent.detach())
        assert isinstance(settled, QTensor)
        return settled


def settled_activation(learned: Learned) -> ActivationQuantizer:
    """What a quantized module rounds its activations with."""
    return ActivationQuantizer(learned.quantizer, learned.fixed())
