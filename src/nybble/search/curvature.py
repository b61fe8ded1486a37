"""Products of the loss's Hessian with a vector, of one layer's diagonal block: exact, without the Hessian.

``H_i v = d(g_i^T v) / dW_i`` with the gradient ``g_i`` of the layer alone (Pearlmutter 1994; as PyHessian, Yao et al.
2020, arXiv:1912.07145, does it). Other layers' rows of the Hessian are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.core.progress import task
from nybble.data.kinds import Batch
from nybble.search.study import Layer, Study

Vector = list[Tensor]
"""A tensor for each parameter of a layer."""


class Curvature:
    """Of the mean loss over a study's batches; used inside :meth:`Study.differentiable`.

    Args:
        study: its loss twice differentiable. A single batch's graph is kept, those of several are built again.
    """

    def __init__(self, study: Study) -> None:
        if not study.batches:
            raise DataError("curvature is of a loss on data, and there is none.")
        self._study = study
        self._graph: dict[str, Tensor] | None = None

    def vector(self, layer: Layer, generator: torch.Generator, signs: bool) -> Vector:
        """Random signs (Rademacher), or normal numbers; drawn on the CPU."""
        found = []
        for name in layer.target.parameters:
            like = self._study.model.get_parameter(name)
            drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
            drawn = torch.where(drawn < 0, -1.0, 1.0) if signs else drawn
            found.append(drawn.to(like.device, like.dtype))
        return found

    def product(self, layer: Layer, vector: Sequence[Tensor]) -> Vector:
        """``H v`` of the layer's block.

        Raises:
            DataError: it is NaN or Inf; names the layer.
        """
        total: Vector | None = None
        for batch in self._study.batches:
            found = self._of(batch, layer, vector)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        mean = [each / len(self._study.batches) for each in total]
        if not all(bool(torch.isfinite(each).all()) for each in mean):
            raise DataError(f"the curvature of {layer.name} is NaN or Inf; check the data, the weights and the dtype.")
        return mean

    def _of(self, batch: Batch, layer: Layer, vector: Sequence[Tensor]) -> Vector:
        gradients = self._gradients(batch)
        own = [gradients[name] for name in layer.target.parameters]
        weights = [self._study.model.get_parameter(name) for name in layer.target.parameters]
        along = dot(own, vector)
        if not along.requires_grad:  # a loss that is linear in these weights
            return [torch.zeros_like(weight) for weight in weights]
        found = torch.autograd.grad(
            along, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )  # fmt: skip
        return [each.detach() for each in found]

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        if len(self._study.batches) > 1:
            return self._study.gradients(batch, graph=True)
        if self._graph is None:
            self._graph = self._study.gradients(batch, graph=True)
        return self._graph


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The sum of products over all tensors of both."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def of_layers(study: Study, what: str, key: str, measured: Callable[[Curvature, Layer], float]) -> list[float]:
    """A number of each layer's block, kept from an interrupted run.

    Args:
        study: its layers and its loss.
        what: for the bar.
        key: of what decides the number, but for the layer.
        measured: the number.
    """
    found: list[float] = []
    with study.differentiable(), task(study.progress, len(study.layers), what) as bar:
        curvature = Curvature(study)
        for layer in study.layers:

            def measure(layer: Layer = layer) -> list[float]:
                return [measured(curvature, layer)]

            found += study.keep(f"{key} {layer.name}", measure)
            bar.advance(note=layer.name)
    return found
