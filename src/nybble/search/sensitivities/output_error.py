"""The squared error of a layer's output on calibration inputs, relative to the output: ``tr(dW H dW^T) / tr(W H W^T)``.

``H = E[x x^T]`` of the float network's inputs, as solvers have it; no gradients, one pass of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble.calibration.statistics import SecondMoment
from nybble.core.errors import DataError
from nybble.core.progress import task
from nybble.search.sensitivities import Sensitivity
from nybble.search.study import Layer, Study


@dataclass(frozen=True, kw_only=True)
class OutputError(Sensitivity):
    """Each layer's share of its own output that is lost, times its number of outputs of a token.

    Attributes:
        moments: ``full``, the exact error; ``diagonal``, of inputs that aren't correlated: less memory.
        relative: over the output of the float weights; else in the output's own units.
    """

    moments: Literal["full", "diagonal"] = "full"
    relative: bool = True

    def measure(self, study: Study) -> Tensor:  # noqa: D102
        moments = self._gathered(study)
        rows = []
        for layer, own in zip(study.layers, moments, strict=True):
            whole = sum(float(_error(w, h)) for w, h in zip(study.matrices(layer).detach().float(), own, strict=True))
            scale = layer.target.shape[0] / (whole or 1.0) if self.relative else 1.0
            found = [
                sum(float(_error(change, h)) for change, h in zip(study.change(layer, item), own, strict=True))
                for item in range(len(layer.menu))
            ]
            rows.append([scale * each for each in found])
        return torch.tensor(rows, dtype=torch.float64)

    @torch.no_grad()
    def _gathered(self, study: Study) -> list[list[Tensor]]:
        """Of each matrix of each layer: [columns, columns], their diagonal, or a stack of those of groups."""
        parts = [[self._moment(layer) for _ in range(layer.target.matrices)] for layer in study.layers]
        with ExitStack() as undo:
            current: list[Tensor | None] = [None]
            for layer, own in zip(study.layers, parts, strict=True):
                module = study.model.get_submodule(layer.target.module)
                handle = module.register_forward_pre_hook(_watcher(layer, own, current), with_kwargs=True)
                undo.callback(handle.remove)
            with task(study.progress, len(study.batches), "inputs of batches") as bar:
                for batch in study.batches:
                    current[0] = batch.real
                    study.run(batch)
                    bar.advance()
        return [[self._mean(part, layer) for part in own] for layer, own in zip(study.layers, parts, strict=True)]

    def _moment(self, layer: Layer) -> _Diagonal | SecondMoment:
        columns, groups = layer.target.shape[1], layer.target.groups
        return _Diagonal() if self.moments == "diagonal" else SecondMoment(columns, groups=groups)

    def _mean(self, part: _Diagonal | SecondMoment, layer: Layer) -> Tensor:
        found = part.mean(layer.name)
        if found is None and layer.target.matrices > 1:  # an expert that no token was sent to
            columns = layer.target.shape[1]
            return torch.zeros((columns, columns) if self.moments == "full" else columns, dtype=torch.float32)
        if found is None:
            raise DataError(f"{layer.name} saw no input in the calibration data; give more, or add it to --ignore.")
        return found


class _Diagonal:
    """Mean squares of columns."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor) -> None:
        squares = x.double().square().sum(-2) if x.dim() > 1 else x.double().square()
        while squares.dim() > 1:
            squares = squares.sum(0)
        self._sum = squares if self._sum is None else self._sum + squares
        self._rows += x[..., 0].numel()

    def mean(self, name: str) -> Tensor | None:
        return None if self._sum is None or not self._rows else (self._sum / self._rows).float()


def _watcher(layer: Layer, own: list[Any], current: list[Tensor | None]) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind, real = layer.target.kind, current[0]
        if kind.fused:
            for number, rows in kind.routed(module, layer.target.leaf, args, kwargs):
                own[number].add(rows)
            return
        x = kind.reads(args, kwargs)
        own[0].add(kind.rows(module, x if real is None or x.shape[:2] != real.shape else x[real]))

    return watch


def _error(change: Tensor, moment: Tensor) -> Tensor:
    """``tr(D H D^T)`` of D [rows, columns]; of H [groups, ...] each for its share of the rows."""
    if moment.dim() == 1:
        return (change.square() @ moment).sum(dtype=torch.float64)
    if moment.dim() == 3:
        parts = change.reshape(moment.shape[0], -1, change.shape[-1])
        return ((parts @ moment) * parts).sum(dtype=torch.float64)
    return ((change @ moment) * change).sum(dtype=torch.float64)


PART = OutputError
