"""The residual stream in another basis: an outlier channel is spread over all, and every weight that meets it rotates.

Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4 (stage 1a): an RMS norm without weights commutes with a
rotation R of the hidden states, norm(x R) = norm(x) R. So the weights g of every norm go into what reads it, and

    embedding E R        readers (W g) R        writers R^T W, R^T b        head (W g) R

compute the same logits. The stream between blocks is x R from then on. A head tied to the embedding becomes another
matrix, as it alone has the weights of the last norm: it is untied, and the file holds both. (One table would serve both
only where those weights are all alike.) ``block`` rotates blocks of neighbours, which is what formats with short blocks
(MX: 32) gain from: across the whole row a rotation makes every block as loud as the loudest. What lies between values
and attention's output is for the transform ``hadamard``, a matrix that is learned for ``learned-rotation``; the inputs
of an MLP's last layer, behind a product of two activations, can only be rotated while the model runs, which
``online-rotation`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.calibration.block import BlockState
from nybble.calibration.window import Window
from nybble.core.errors import ModelError, SchemeError
from nybble.core.orthogonal import Matrix, rotation
from nybble.models.adapter import Adapter, NormFold
from nybble.nn.kinds.tied import untie_head
from nybble.transforms import Rewrite, Transform
from nybble.transforms._folds import Matrices


@dataclass(frozen=True, kw_only=True)
class Rotate(Transform):
    """Options of the method.

    Attributes:
        matrix: ``hadamard``, where the width has one, or ``orthogonal``: random, by the seed.
        block: channels that are rotated among themselves; 0 rotates all of them together.
        signs: multiply the channels by random signs first.
    """

    matrix: Matrix = "hadamard"
    block: int = 0
    signs: bool = True

    reads_inputs: ClassVar[bool] = False
    moves_stream: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 0:
            raise SchemeError(f"rotate: block={self.block} is a number of channels, or 0 for all.")

    def works_on(self, adapter: Adapter, block: Any, config: Any) -> bool:  # noqa: D102
        return bool(adapter.writers_of(block))

    def check(self, name: str, adapter: Adapter, model: Any) -> None:  # noqa: D102
        config: Any = model.config
        reasons = self._reasons(adapter, model)
        if reasons:
            raise ModelError(
                f"transform {name!r} can't rotate the residual stream of this model: {'; '.join(reasons)}. Take "
                "online-rotation (layers: all), which rotates inputs of linear layers whatever norm is before them, or "
                "hadamard, which stays inside the heads."
            )
        rotation(int(config.hidden_size), self.matrix, self.block, self.signs, 0)
        for path, block in zip(adapter.block_names(model), adapter.blocks_of(model), strict=True):
            known = {*adapter.writers_of(block)}.union(*(fold.readers for fold in adapter.norm_folds_of(block, config)))
            others = {n.removesuffix(".weight") for n, p in block.named_parameters() if p.dim() > 1} - known
            if others:
                raise ModelError(
                    f"transform {name!r}: {path} has {', '.join(sorted(others))}, of which the adapter {adapter.name} "
                    "does not say whether it reads the residual stream or writes to it."
                )

    def _reasons(self, adapter: Adapter, model: Any) -> list[str]:
        found = []
        if not adapter.writers:
            found.append(
                f"the adapter {adapter.name} lists no RMS norms with what reads and writes between them alone "
                "(a LayerNorm takes a mean, and norms behind attention or MLP have weights of their own)"
            )
        if adapter.head is None or not isinstance(model.get_output_embeddings(), nn.Linear):
            found.append("it has no head, so its output would be rotated too")
        return found

    def prepare(self, adapter: Adapter, model: Any) -> None:  # noqa: D102
        untie_head(model)

    def outside(self, adapter: Adapter, model: Any, seed: int) -> Iterator[Rewrite]:  # noqa: D102
        state = BlockState(model, "")
        parameters = {"rotation": self._rotation(int(model.config.hidden_size), seed, torch.device("cpu"))}
        for name in adapter.embeddings:
            yield _reading(state, (name,), None, parameters)
        # all norms of a family are of one class
        assert adapter.head is not None and adapter.final_norm is not None  # check() lets no other model in
        last = NormFold(norm=adapter.final_norm, readers=(adapter.head,), offset=adapter.norm_folds[0].offset)
        yield _reading(state, last.readers, last, parameters)

    def rewrites(self, window: Window, adapter: Adapter, path: str) -> Iterator[Rewrite]:  # noqa: D102
        config: Any = window.calibration.config
        matrix = self._rotation(int(config.hidden_size), window.calibration.seed, window.calibration.device)
        yield from self.turning(window.block, adapter, config, {"rotation": matrix})

    def turning(
        self, state: BlockState, adapter: Adapter, config: Any, parameters: Mapping[str, Tensor]
    ) -> Iterator[Rewrite]:
        """What it does to a block with the parameter ``rotation``, float32 [width, width]."""
        for fold in adapter.norm_folds_of(state.module, config):
            yield _reading(state, fold.readers, fold, parameters)
        for name in adapter.writers_of(state.module):
            yield _writing(state, name, parameters)

    def _rotation(self, width: int, seed: int, device: torch.device) -> Tensor:
        return rotation(width, self.matrix, self.block, self.signs, seed).to(device)


def _reading(
    state: BlockState, names: Sequence[str], fold: NormFold | None, parameters: Mapping[str, Tensor]
) -> Rewrite:
    """``(W g) R`` of the matrices that read a norm, which keeps no weights; of an embedding, without one, ``E R``."""
    matrices = Matrices(state)
    norm = None if fold is None else f"{fold.norm}.weight"
    offset = 0.0 if fold is None else fold.offset

    def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            matrix = matrices.get(name, weights)
            if norm is not None:
                matrix = matrix * (weights[norm] + offset)
            found |= matrices.put(name, matrix @ given["rotation"].to(matrix.device))
        if norm is not None:
            found[norm] = torch.full_like(weights[norm], 1 - offset)
        return found

    reads = [parameter for name in names for parameter in matrices.parameters(name)]
    return Rewrite(weights=(*reads, *([] if norm is None else [norm])), parameters=parameters, function=function)


def _writing(state: BlockState, name: str, parameters: Mapping[str, Tensor]) -> Rewrite:
    """``R^T W`` and ``R^T b``."""
    matrices = Matrices(state)
    bias = matrices.bias(name)

    def function(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = matrices.put(name, given["rotation"].mT @ matrices.get(name, weights))
        if bias is not None:
            found[bias] = weights[bias] @ given["rotation"]
        return found

    return Rewrite(
        weights=(*matrices.parameters(name), *([bias] if bias else [])), parameters=parameters, function=function
    )


PART = Rotate
