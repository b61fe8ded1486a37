"""Convolutions: each kernel is a row of the matrix, and what the kernels see (im2col) are the rows it is used on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nybble.core.errors import SchemeError
from nybble.nn.batchnorm import drop_norm
from nybble.nn.conv import Geometry, QuantConv, is_conv
from nybble.nn.kinds import Get, LayerKind, Quantized, Target
from nybble.nn.layouts import Layouts
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

PATCHES = 512  # of an image, that statistics are made of at most
_MOST = 1 << 19  # values of an image's patches: many groups or channels would fill the memory


class Conv(LayerKind):
    """``nn.Conv1d``, ``nn.Conv2d``, timm's ``Conv2dSame``; their matrix is [out, in / groups * kernel]."""

    entry = "conv"
    classes = ("Conv",)
    stand_ins = (QuantConv,)
    channels_first = True
    rows_a_sample = PATCHES

    def claims(self, module: nn.Module) -> bool:  # noqa: D102
        return is_conv(module)

    def resembles(self, module: nn.Module) -> bool:  # noqa: D102
        return isinstance(module, _ConvNd)

    def class_names(self, module: nn.Module, convolutional: bool = False) -> tuple[str, ...]:
        """In a convolutional network ``Linear``, a scheme's default target, means its convolutions too."""
        return (*super().class_names(module), *(("Linear",) if convolutional else ()))

    def targets(self, name: str, module: nn.Module) -> Iterator[Target]:  # noqa: D102
        for target in super().targets(name, module):
            yield replace(target, groups=Geometry.of(module).groups)

    def check_activations(self, quantizer: Quantizer) -> None:  # noqa: D102
        if not quantizer.granularity.for_convolutions:
            raise SchemeError(
                f"activations of a convolution can't have the scales of {quantizer}: one value meets many kernel "
                "positions. Write 'tensor', or 'plane' for one scale for each channel of each image."
            )

    def matrix(self, module: nn.Module, leaf: str, get: Get) -> Tensor:  # noqa: D102
        return get("weight").flatten(1)

    def values(self, module: nn.Module, leaf: str, matrix: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": matrix.reshape(Geometry.of(module).shape)}

    def cut(self, module: nn.Module) -> str:  # noqa: D102
        return str(replace(Geometry.of(module), channels=(0, 0)))

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:  # noqa: D102
        geometry = Geometry.of(module)
        columns = geometry.groups * math.prod(geometry.shape[1:])
        return geometry.patches(x, max(1, min(PATCHES, _MOST // columns)))

    def products(self, module: nn.Module, output: Tensor) -> int:  # noqa: D102
        return output.shape[2:].numel() * Geometry.of(module).groups

    def stand_in(  # noqa: D102
        self, old: nn.Module, weight: QTensor | Tensor, bias: Tensor | None, made: Quantized
    ) -> QuantConv:
        return QuantConv(weight, bias, Geometry.of(old), made.inputs, made.outputs, made.folded)

    def more(self, module: nn.Module) -> dict[str, Any]:  # noqa: D102
        assert isinstance(module, QuantConv)
        folded = {"folded": module.folded} if module.folded else {}
        return {"bias": module.bias is not None, **folded}

    def empty_bias(self, old: nn.Module, matrix: Tensor, entry: dict[str, Any]) -> Tensor | None:
        """A folded BatchNorm has left one where the float convolution has none."""
        if not entry["bias"]:
            return None
        return torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)

    def restore(self, root: nn.Module, name: str, entry: dict[str, Any], layouts: Layouts) -> None:  # noqa: D102
        super().restore(root, name, entry, layouts)
        if entry.get("folded"):
            drop_norm(root, str(entry["folded"]))


PART = Conv()
