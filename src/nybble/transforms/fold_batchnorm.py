"""BatchNorms go into the convolutions before them: exact, and what deployed networks do before they are quantized.

See :mod:`nybble.nn.batchnorm` for the factors. Which norm reads which convolution is seen by running the block once. A
model without BatchNorms stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.window import Window
from nybble.models.adapter import Adapter
from nybble.nn.batchnorm import drop_norm, factors, find_folds, foldable
from nybble.nn.kinds import kind_of
from nybble.transforms import Rewrite, Transform


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Transform):
    """No options: a BatchNorm folds or it doesn't."""

    required: ClassVar[bool] = False

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        modules = list(block.modules())
        return any(foldable(m) for m in modules) and any(kind.channels_first for m in modules if (kind := kind_of(m)))

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:  # noqa: D102
        for norm, conv in self._pairs(window, path).items():
            yield folding(window.block, norm, conv)

    def run(self, window: Window, adapter: Adapter, path: str) -> None:  # noqa: D102
        state = window.block
        if not self.works_on(adapter, state.module, window.calibration.config):
            return
        for norm, conv in self._pairs(window, path).items():
            folding(state, norm, conv).apply(state)
            drop_norm(state.module, norm)
            state.folded[conv] = f"{state.prefix}{norm}"

    def _pairs(self, window: Window, path: str) -> dict[str, str]:
        """Norm -> convolution, of the convolutions that are going to be quantized."""
        state = window.block
        convs = {target.name for target in state.targets if target.kind.channels_first}
        call, given = next(iter(window.batches(path)()))
        found = find_folds(state.module, partial(call.run, state.module, given))
        return {norm: conv for norm, conv in found.items() if conv in convs}


def folding(state: BlockState, norm: str, conv: str) -> Rewrite:
    """Multiply a convolution's channels, and shift its bias, as a BatchNorm would; it is made if there is none."""
    module: Any = state.module.get_submodule(norm)
    tensors = [f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    names = [name for name in (*tensors, f"{conv}.weight", f"{conv}.bias") if state.has(name)]

    def function(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by, add = factors(module, lambda leaf: weights.get(f"{norm}.{leaf}"))
        kernel, bias = weights[f"{conv}.weight"], weights.get(f"{conv}.bias")
        return {
            f"{conv}.weight": kernel * by.view(-1, *[1] * (kernel.dim() - 1)),
            f"{conv}.bias": add if bias is None else add + by * bias,
        }

    return Rewrite(weights=tuple(names), parameters={}, function=function)


@torch.no_grad()
def fold_batchnorms(network: nn.Module, x: Tensor) -> dict[str, str]:
    """Fold every BatchNorm of a network that reads a convolution; recipes do this by the step of this name.

    Args:
        network: in eval mode; changed in place.
        x: an input, to see what reads what.

    Returns:
        The BatchNorms that are gone, and the convolutions that they are in.
    """
    state, pairs = BlockState(network, ""), find_folds(network, partial(network, x))
    for norm, conv in pairs.items():
        folding(state, norm, conv).apply(state)
        drop_norm(network, norm)
    return pairs


PART = FoldBatchnorm
