"""A source some of whose tensors were trained on: all else is as the model's own place has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nybble.models.sources import ModelSource, StoredTensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class ChangedSource(ModelSource):
    """Gives other values for some tensors; names, shapes and everything beside the weights are the origin's.

    Its fingerprint is the origin's too: what made the changes is told elsewhere (a recipe's steps).

    Args:
        origin: where the model comes from.
        tensors: float32, by name, each of the shape that it has there; on the CPU.
    """

    aliases = True

    def __init__(self, origin: ModelSource, tensors: Mapping[str, Tensor]) -> None:
        self.origin, self.spec, self.config = origin, origin.spec, origin.config
        self.streamable, self.note = origin.streamable, origin.note
        self.tensors = {origin.ties().get(name, name): tensor for name, tensor in tensors.items()}

    def stored(self) -> Mapping[str, StoredTensor]:  # noqa: D102
        found = dict(self.origin.stored())
        return found | {name: replace(found[name], dtype=torch.float32) for name in self.tensors}

    def ties(self) -> Mapping[str, str]:  # noqa: D102
        return self.origin.ties()

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        yield from self.origin.read([name for name in names if name not in self.tensors])
        yield from ((name, self.tensors[name]) for name in names if name in self.tensors)

    def tokenizer(self) -> PreTrainedTokenizerBase:  # noqa: D102
        return self.origin.tokenizer()

    def preprocessing(self) -> dict[str, Any]:  # noqa: D102
        return self.origin.preprocessing()

    def side_files(self) -> Mapping[str, Path]:  # noqa: D102
        return self.origin.side_files()

    def write_side_files(self, folder: Path) -> str:  # noqa: D102
        return self.origin.write_side_files(folder)

    def generation_config(self) -> GenerationConfig | None:  # noqa: D102
        return self.origin.generation_config()

    def weight_files(self) -> tuple[Path, ...]:  # noqa: D102
        return self.origin.weight_files()
