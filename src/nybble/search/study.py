"""The float model in memory, its layers and their menu, and the data: what sensitivities measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble.core.errors import DataError, ModelError
from nybble.core.progress import Progress, Silent
from nybble.core.shapes import Float32
from nybble.data.kinds import Batch
from nybble.nn.kinds import Target, matrix_at, values_at
from nybble.quantizer import Quantizer
from nybble.search.kept import Kept
from nybble.search.losses import own_labels

DTYPE = torch.bfloat16
"""Of the model that is quantized in the end: scales whose dtype a line leaves to the model are of it."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One that gets a format.

    Attributes:
        target: under its full name. menu: what it may have, as its shape allows it.
        inputs: of what enters it, in each format of the menu; none where nothing looks at it.
    """

    target: Target
    menu: Sequence[Quantizer]
    inputs: Sequence[Quantizer | None] = ()

    @property
    def name(self) -> str:
        """Of the module or fused parameter."""
        return self.target.name


@dataclass(frozen=True, kw_only=True)
class Study:
    """See the module.

    Attributes:
        model: float, all of it loaded, in evaluation mode. layers: what is searched. batches: of calibration data.
        loss: of an output and its batch, a scalar with a gradient, the mean over samples.
        seed: of probes. keep: what was measured. progress: told after each step.
    """

    model: nn.Module
    layers: Sequence[Layer]
    batches: Sequence[Batch] = ()
    loss: Callable[[Any, Batch], Tensor] = own_labels
    seed: int = 0
    keep: Kept = field(default_factory=Kept)
    progress: Progress = field(default_factory=Silent)

    def matrices(self, layer: Layer, get: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's matrices [matrices, out, in], a view where it can be one.

        Args:
            layer: of the study.
            get: tensors that stand for the parameters, by full name (gradients); None: the parameters.
        """
        found = matrix_at(self.model, layer.name, None if get is None else get.__getitem__)
        return found if found.dim() == 3 else found[None]

    @torch.no_grad()
    def rounded(self, layer: Layer, item: int) -> Float32[Tensor, "matrices rows columns"]:
        """The layer's matrices in a format of its menu."""
        quantizer = layer.menu[item].of_model(DTYPE)
        return torch.stack([quantizer.fake_quantize(matrix.float()) for matrix in self.matrices(layer)])

    @torch.no_grad()
    def change(self, layer: Layer, item: int) -> Float32[Tensor, "matrices rows columns"]:
        """What a format does to the layer's matrices: rounded minus float."""
        return self.rounded(layer, item) - self.matrices(layer).float()

    @contextmanager
    def quantized(self, choice: Mapping[int, int]) -> Iterator[None]:
        """Inside, some layers are rounded in place; ``choice``: number of the layer -> of the format."""
        before = dict[str, Tensor]()
        try:
            with torch.no_grad():
                for number, item in choice.items():
                    layer = self.layers[number]
                    rounded = self.rounded(layer, item)
                    fused = matrix_at(self.model, layer.name).dim() == 3
                    for name, value in values_at(self.model, layer.name, rounded if fused else rounded[0]).items():
                        parameter = self.model.get_parameter(name)
                        before[name] = parameter.detach().clone()
                        parameter.copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.model.get_parameter(name).copy_(value)

    def run(self, batch: Batch) -> Any:
        """The model's output; attention in plain products, whose gradients have gradients."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(**batch.inputs)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Inside, the searched parameters ask for gradients, and no others."""
        asked = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            self.model.requires_grad_(False)
            for layer in self.layers:
                for name in layer.target.parameters:
                    self.model.get_parameter(name).requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, was in asked.items():
                parameter.requires_grad_(was)

    def gradients(self, batch: Batch, graph: bool = False) -> dict[str, Tensor]:
        """Of the loss of a batch by the searched parameters, by full name; inside :meth:`differentiable`.

        Args:
            batch: of the study's.
            graph: whether they are to have gradients themselves.

        Raises:
            ModelError: the loss is no scalar, has no gradient, or a layer none. DataError: one isn't finite.
        """
        loss = self.loss(self.run(batch), batch)
        if loss.dim() or not loss.requires_grad:
            what = "has no gradient" if loss.requires_grad is False else f"has the shape {list(loss.shape)}"
            raise ModelError(
                f"the loss {what}: a sensitivity by gradients needs a scalar that depends on the weights. "
                "Take --method weight-error, output-error or kl."
            )
        names = {name: layer.name for layer in self.layers for name in layer.target.parameters}
        asked = [self.model.get_parameter(name) for name in names]
        found = torch.autograd.grad(loss, asked, create_graph=graph, allow_unused=True)
        result = {}
        for (name, layer), gradient in zip(names.items(), found, strict=True):
            if gradient is None:
                raise ModelError(f"no gradient of the loss reached {layer}; add it to --ignore.")
            if not bool(torch.isfinite(gradient).all()):
                raise DataError(f"the gradient of the loss by {layer} is NaN or Inf; check the data and the weights.")
            result[name] = gradient
        return result
