"""Inputs of layers rotated while the model runs, in blocks of neighbouring channels; their weights are rotated along.

    x W^T  =  (x V) (W V)^T,      V = diag(B, B, ..., B),      B = diag(signs) H / sqrt(block)

What can be folded into weights costs nothing at run time (``rotate``, ``hadamard``). The input of an MLP's last layer
can't be: it is the product of two activations, and holds the worst outliers. Ashkboos et al. 2024 (QuaRot),
arXiv:2404.00456, section 4 (stage 1c) and Liu et al. 2024 (SpinQuant), arXiv:2405.16406, R4 rotate it online, by a
Hadamard matrix as wide as it is. Blocks as wide as those that share a scale (MX: 32, NVFP4: 16 or a multiple) spread an
outlier over its own block alone, and serve any layer: ``layers: all``.

In float nothing changes, so any other transform may stand before or behind this one. A layer that stays in float is not
rotated. Their rotation of queries and keys behind the rotary embedding (R3) is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nybble.calibration.window import Window
from nybble.core.errors import ModelError, SchemeError
from nybble.core.orthogonal import check_block, hadamard_factors, largest_block
from nybble.core.seeds import derive_seed
from nybble.models.adapter import Adapter
from nybble.models.family import at, under
from nybble.nn.kinds import kind_of
from nybble.nn.rotation import BlockRotation, mark_rotated, rotation_of
from nybble.scheme import matches
from nybble.transforms import Rewrite, Transform

MLP, ALL = "mlp", "all"


@dataclass(frozen=True, kw_only=True)
class OnlineRotation(Transform):
    """Options of the method.

    Attributes:
        layers: ``mlp``, the last layer of every MLP; ``all``, every linear layer of the blocks; or a layer's name in
            its block, or ``re:`` and a pattern for it.
        block: channels that are rotated among themselves; 0 means as many as a Hadamard matrix is known for, all of
            them as a rule.
        signs: multiply the channels by random signs first, the same in every block.
    """

    layers: str = MLP
    block: int = 0
    signs: bool = False

    reads_inputs: ClassVar[bool] = False
    rotates_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 0 or self.block == 1:
            raise SchemeError(f"online-rotation: block={self.block} is a number of channels from 2, or 0 for all.")
        if self.block:
            hadamard_factors(self.block)

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        return any(True for _ in self._chosen(adapter, block))

    def check(self, name: str, adapter: Adapter, model: Any) -> None:  # noqa: D102
        if not any(self.works_on(adapter, block, model.config) for block in adapter.blocks_of(model)):
            why = f"no linear layer of its blocks is called {self.layers!r}"
            if self.layers == MLP:
                why = (
                    f"the adapter {adapter.name} names none that ends an MLP (experts that are one parameter are not "
                    "rotated)"
                )
            raise ModelError(
                f"transform {name!r} finds no layer to rotate the input of: {why}. Say which, by a name or a pattern "
                "in layers, or take layers: all."
            )
        for path, block in zip(adapter.block_names(model), adapter.blocks_of(model), strict=True):
            for layer, module in self._chosen(adapter, block):
                rotation = rotation_of(module)
                if rotation is None or rotation.block == 1:
                    raise ModelError(
                        f"transform {name!r}: {under(path)}{layer} has {_columns(module)} channels, which no Hadamard "
                        "matrix rotates, in blocks or whole; name others in layers."
                    )

    def prepare(self, adapter: Adapter, model: Any) -> None:
        """Mark the layers of every block.

        Raises:
            SchemeError: the block doesn't divide a layer's channels.
        """
        for path, block in zip(adapter.block_names(model), adapter.blocks_of(model), strict=True):
            for layer, module in self._chosen(adapter, block):
                width = _columns(module)
                check_block("block", self.block, width, f"of {under(path)}{layer}", "hadamard")
                size = self.block or largest_block(width)
                mark_rotated(module, BlockRotation(size, self._signs(size)))

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:
        """None: what is quantized of a marked layer is rotated."""
        return iter(())

    def _chosen(self, adapter: Adapter, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The layers of a block by name, marked or not."""
        known = dict(block.named_modules())
        if self.layers == MLP:
            names = mlp_ends(adapter, block)
        else:
            names = [n for n in known if self.layers == ALL or matches(self.layers, n, ())]
        for name in names:
            kind = kind_of(known[name]) if name in known else None
            if kind is not None and kind.unrotated.entry == "linear":
                yield name, known[name]

    def _signs(self, size: int) -> torch.Tensor | None:
        if not self.signs:
            return None
        generator = torch.Generator().manual_seed(derive_seed(0, "online-rotation", str(size)))
        with torch.device("cpu"):
            return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(torch.int8)


def mlp_ends(adapter: Adapter, block: nn.Module) -> list[str]:
    """Layers that end an MLP: they write to the residual stream, or follow a layer, and no attention is before them."""
    behind_attention = {fold.second for fold in adapter.linear_folds if fold.heads}
    found = [*adapter.writers_of(block), *(f.second for f in adapter.linear_folds if at(block, f.second) is not None)]
    return [name for name in dict.fromkeys(found) if name not in behind_attention]


def _columns(module: nn.Module) -> int:
    kind = kind_of(module)
    assert kind is not None
    return int(kind.matrix(module, "", lambda leaf: getattr(module, leaf).to("meta")).shape[1])


PART = OnlineRotation
