"""What models read, one kind a file: running text, sentences, images.

An adapter names the kind of its models by key. A kind knows how a SRC becomes samples, how these go into the model,
what must fit, how large they are, and which files have to stand beside the weights. How models of a kind are judged
is in :mod:`nybble.eval.judges`, under the same key. Other packages add kinds through entry points of the group
``nybble.data.kinds``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.core.registry import Registry
from nybble.data.samples import Origin, Samples, Wanted
from nybble.data.text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = Registry("nybble.data.kinds", "kind of data", lambda part: isinstance(part, DataKind))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some samples on their way into a model.

    Attributes:
        inputs: by the model's argument; the main one first.
        real: as :meth:`DataKind.real` says.
    """

    inputs: dict[str, Tensor]
    real: Tensor | None


class Size(NamedTuple):
    """How much samples are: their number, and the tokens (vectors that a layer sees) of one, rounded up."""

    samples: int
    tokens: int


class DataKind(ABC):
    """A kind of data; the methods with a body serve every kind whose inputs are tensors with samples in front.

    Attributes:
        asks: whether a run that wants data and is given none is refused; else it goes without what only improves it.
        of_model: whether the model makes its samples itself, of what a SRC says they are to be about.
    """

    asks: ClassVar[bool] = True
    of_model: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> Samples:
        """Read a SRC and bring it into the model's form.

        Args:
            src: what the user typed; ``builtin`` where they typed nothing.
            origin: the model's place.
            wanted: how many samples, which, of what length.

        Raises:
            UsageError: a SRC that is not of this kind. FileError, DataError: it can't be read, or has too little.
        """

    def of_texts(self, texts: TextSource, origin: Origin, wanted: Wanted) -> Samples:
        """Bring documents into the model's form; by default there is no way to.

        Raises:
            UsageError: models of this kind read no text.
        """
        raise UsageError("this model reads no text, and the data is a list of texts.")

    def fitted(self, samples: Samples, model: Any) -> Samples:
        """The samples as this model, which may be on the meta device, is called with them; most kinds' are ready."""
        return samples

    def check(self, samples: Samples, model: Any) -> None:
        """Refuse samples that don't fit a model, which may be on the meta device.

        Raises:
            DataError: here, no samples, or inputs that don't have equally many; kinds know more.
        """
        counts = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in samples.inputs.items()}
        if len(set(counts.values())) != 1 or not all(counts.values()):
            found = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "no inputs"
            raise DataError(
                f"data {samples.source!r} has {found}; each input needs equally many samples, at least one."
            )

    def batch(self, inputs: Mapping[str, Tensor], start: int, stop: int, device: torch.device | str) -> Batch:
        """Samples ``start .. stop`` of ``inputs`` on a device."""
        given = {name: tensor[start:stop].to(device) for name, tensor in inputs.items()}
        return Batch(inputs=given, real=self.real(given))

    def real(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Bool [samples, tokens], which tokens are no padding, from an ``attention_mask``; None where all are real."""
        mask = inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    def probe(self, inputs: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """The least that shows what a model does with its inputs: one sample."""
        return self.batch(inputs, 0, 1, device).inputs

    def probes(self, inputs: Mapping[str, Tensor], device: torch.device | str) -> list[dict[str, Tensor]]:
        """The probe, and behind a part of a sample all of it: some models run on none but their own length."""
        least, whole = self.probe(inputs, device), self.batch(inputs, 0, 1, device).inputs
        return [least] if all(least[name].shape == whole[name].shape for name in whole) else [least, whole]

    def example(self, model: Any, origin: Origin | None = None) -> dict[str, Tensor] | None:
        """What a model can be called with, made of its config (and its place) alone; None where a kind can't say."""
        return None

    def size(self, samples: Samples) -> Size:
        """What the estimates of memory and time count with."""
        count = next(iter(samples.inputs.values())).shape[0]
        return Size(count, -(-samples.tokens // count))

    def tokenizer(self, origin: Origin) -> PreTrainedTokenizerBase | None:
        """The tokenizer, where samples are made by one."""
        return None

    def write_side_files(self, origin: Origin, folder: Path) -> None:  # noqa: B027 - most kinds need none
        """Write beside the weights what a later user needs to make samples of this kind; by default nothing.

        Tokenizers, preprocessor configs and the like are there already: they come from the model's own place.

        Raises:
            FileError: it can't be written.
        """


def data_kind(key: str) -> DataKind:
    """The kind that an adapter names.

    Raises:
        UsageError: no such kind; or a package registered something else under its name.
    """
    found: DataKind = KINDS.get(key)
    return found
