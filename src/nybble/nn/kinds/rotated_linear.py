"""Linear layers that are quantized behind a rotation of their input, which the model computes while it runs.

In float such a layer stays as it is, and is only marked (:func:`nybble.nn.rotation.mark_rotated`): it computes the same
on every path where nothing is rounded, and transforms see the channels of its input. What is quantized is its weight
times V, and calibration sees what that is multiplied with: the rotated input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import FileError
from nybble.nn.kinds import Get, Kind, LayerKind, Quantized, Stored, module_at
from nybble.nn.kinds.linear import PART as LINEAR
from nybble.nn.layouts import Layouts
from nybble.nn.rotated_linear import RotatedQuantLinear
from nybble.nn.rotation import BlockRotation, mark_rotated, rotation_of
from nybble.qtensor import QTensor


class RotatedLinear(LayerKind):
    """``x V (W V)^T + b`` for each row x."""

    entry = "rotated-linear"
    classes = ("Linear",)
    stand_ins = (RotatedQuantLinear,)
    by_rows = True

    @property
    def unrotated(self) -> Kind:  # noqa: D102
        return LINEAR

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return rotation_of(module) is not None

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:
        """The float layer's times V, float32 (of float64 as it is)."""
        plain = LINEAR.matrix(module, leaf, get)
        return _rotated(module, plain if plain.dtype == torch.float64 else plain.float())

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return LINEAR.values(module, leaf, _rotated(module, matrix, back=True))

    def cut(self, module: nn.Module) -> str:
        """Layers that read one tensor share statistics where they rotate it alike."""
        rotation = _of(module)
        return f"{rotation.in_words} {[buffer.tolist() for buffer in rotation.buffers()]}"

    def enters(self, module: nn.Module, x: Tensor) -> Tensor:  # noqa: D102
        return _rotated(module, x)

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:  # noqa: D102
        return self.enters(module, x)

    def stand_in(  # noqa: D102
        self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized
    ) -> RotatedQuantLinear:
        place = next(iter(weight.tensors().values())) if isinstance(weight, QTensor) else weight
        rotation = copy.deepcopy(_of(old)).at(place.device)
        return RotatedQuantLinear(weight, bias, made.inputs, made.outputs, rotation)

    def more(self, module: nn.Module) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, RotatedQuantLinear)
        return {"rotation": module.rotation.to_dict()}

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        old, rotation = module_at(root, name, name), BlockRotation.from_dict(entry["rotation"])
        before = rotation_of(old)
        mark_rotated(old, None)
        if not LINEAR.claims(old):
            raise FileError(f"{name} is described as a {self.entry}; in this model it is a {type(old).__name__}.")
        columns = LINEAR.matrix(old, "", lambda leaf: getattr(old, leaf)).shape[1]
        if columns % rotation.block:
            raise FileError(f"{name} has {columns} channels, which blocks of {rotation.block} do not divide.")
        mark_rotated(old, rotation)
        try:
            super().restore(root, name, entry, layouts)
        finally:
            mark_rotated(old, before)

    def stored(self, name: str, entry: dict[str, Any], weights: Sequence[QTensor], into: Stored) -> None:  # noqa: D102
        super().stored(name, entry, weights, into)
        rotation = BlockRotation.from_dict(entry["rotation"])
        into.tables(f"{name}.rotation", rotation.state_dict())
        into.notes[f"{name}.weight"] = f"behind {rotation.in_words}"


def _of(module: nn.Module) -> BlockRotation:
    found = rotation_of(module)
    assert found is not None  # or the kind would not claim it
    return found


def _rotated(module: nn.Module, x: Tensor, back: bool = False) -> Tensor:
    rotation = _of(module)
    if x.is_meta or any(buffer.is_meta for buffer in rotation.buffers()):  # shapes alone are asked for
        return torch.empty_like(x)
    found: Tensor = rotation.at(x.device)(x, back=back)
    return found


PART: Kind = RotatedLinear()
