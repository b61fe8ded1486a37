"""Root mean square error of a layer's weights and of what enters it, each over its standard deviation.

What DyBit's search weighs against cycles (Zhou et al. 2023, arXiv:2302.12510, as far as it is known here: a
reconstruction). The only sensitivity that looks at a format's inputs, too: a menu has pairs of lines for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError
from nybble.core.progress import task
from nybble.search.sensitivities import Sensitivity
from nybble.search.study import Layer, Study


@dataclass(frozen=True, kw_only=True)
class Rmse(Sensitivity):
    """The sum of both; of inputs that stay in float the weights' alone."""

    pairs: ClassVar[bool] = True

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        entering = self._entering(study)
        rows = []
        for layer, inputs in zip(study.layers, entering, strict=True):
            deviation = float(study.matrices(layer).detach().double().std(correction=0)) or 1.0
            errors = [float(study.change(layer, i).double().square().mean().sqrt()) for i in range(len(layer.menu))]
            rows.append([error / deviation + own for error, own in zip(errors, inputs, strict=True)])
        return torch.tensor(rows, dtype=torch.float64)

    @torch.no_grad()
    def _entering(self, study: Study) -> list[list[float]]:
        """Of each layer, in each format: one pass of the data."""
        if not any(quantizer is not None for layer in study.layers for quantizer in layer.inputs):
            return [[0.0] * len(layer.menu) for layer in study.layers]
        sums = [torch.zeros(len(layer.menu) + 3, dtype=torch.float64) for layer in study.layers]
        current: list[Tensor | None] = [None]
        with ExitStack() as undo:
            for layer, own in zip(study.layers, sums, strict=True):
                module = study.model.get_submodule(layer.target.module)
                undo.callback(module.register_forward_pre_hook(_watcher(layer, own, current), with_kwargs=True).remove)
            with task(study.progress, len(study.batches), "inputs of batches") as bar:
                for batch in study.batches:
                    current[0] = batch.real
                    study.run(batch)
                    bar.advance()
        return [self._errors(layer, own) for layer, own in zip(study.layers, sums, strict=True)]

    def _errors(self, layer: Layer, sums: Tensor) -> list[float]:
        count, total, squares, *errors = sums.tolist()
        if not count:
            raise DataError(f"{layer.name} saw no input in the calibration data; give more, or add it to --ignore.")
        deviation = max(0.0, squares / count - (total / count) ** 2) ** 0.5 or 1.0
        return [(error / count) ** 0.5 / deviation for error in errors]


def _watcher(layer: Layer, sums: Tensor, current: list[Tensor | None]) -> Callable[..., None]:
    """Adds to the count of elements, their sum and squares, and each format's squared errors; padding is left out."""

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, real = layer.target.kind.reads(args, kwargs).float(), current[0]
        x = x if real is None or x.shape[:2] != real.shape else x[real]
        error = partial(_squared, x)
        found = [float(x.numel()), float(x.double().sum()), float(x.double().square().sum()), *map(error, layer.inputs)]
        sums.add_(torch.tensor(found, dtype=torch.float64))

    return watch


def _squared(x: Tensor, quantizer: Any) -> float:
    return 0.0 if quantizer is None else float((quantizer.fake_quantize(x) - x).double().square().sum())


PART = Rmse
