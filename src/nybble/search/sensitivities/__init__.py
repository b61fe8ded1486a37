"""Sensitivities: what each layer loses in each format. One a file, whose ``PART`` is a dataclass.

Numbers of one sensitivity are in one unit over all layers and formats, so that a loop may add them. Other packages add
sensitivities through entry points of the group ``nybble.search.sensitivities``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.core.registry import Registry
from nybble.core.shapes import Float
from nybble.search.study import Study

REGISTRY = Registry(
    "nybble.search.sensitivities", "sensitivity", lambda part: isinstance(part, type) and issubclass(part, Sensitivity)
)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(ABC):
    """A way to measure; its fields are its options in a recipe.

    Attributes:
        reads_data: whether it looks at calibration data. differentiates: whether it needs a loss with a gradient.
        pairs: whether it looks at what formats do to inputs, too, so that a menu has pairs for it.
    """

    registry: ClassVar[Any] = REGISTRY
    reads_data: ClassVar[bool] = True
    differentiates: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    @abstractmethod
    def measure(self, study: Study) -> Float[Tensor, "layers menu"]:
        """float64, of every layer and every format of its menu; the larger, the more is lost.

        Raises:
            NybbleError: the data or the loss can't be used; names the layer.
        """

    def sharpness(self, study: Study) -> list[float]:
        """Of each layer, over all its weights: curvature without what a format does; none: it measures none.

        After :meth:`measure` nothing is measured again.
        """
        return []


def squared_changes(study: Study, factors: Sequence[float]) -> Float[Tensor, "layers menu"]:
    """The squared error of each layer's weights in each format, times a factor a layer."""
    rows = []
    for layer, factor in zip(study.layers, factors, strict=True):
        squares = [study.change(layer, item).square().sum(dtype=torch.float64) for item in range(len(layer.menu))]
        rows.append(factor * torch.stack(squares).cpu())
    return torch.stack(rows)
