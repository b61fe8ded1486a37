"""What running text and sentences share: a tokenizer makes them, embeddings and positions limit them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nybble.core.errors import DataError
from nybble.data.kinds import DataKind, Size
from nybble.data.samples import Origin, Samples, Wanted
from nybble.data.text import TextSource, load_text
from nybble.nn.embedding import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = 4
"""Tokens that show whether a model runs."""


class Cut(Protocol):
    """Documents -> samples of token ids."""

    def __call__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: int | None,
        seq_len: int,
        seed: int | None = None,
        fewer: bool = False,
    ) -> Samples:
        """As :func:`~nybble.data.tokens.token_samples`."""


@dataclass(frozen=True, kw_only=True)
class TextKind(DataKind):
    """Token ids ``input_ids`` [samples, tokens]; ``cut`` makes them of documents."""

    cut: Cut

    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> Samples:
        """Read a text, JSONL file, hub data set or ``builtin``, and cut it."""
        tokenizer = origin.tokenizer()
        return self._cut(load_text(src, wanted.part, tokenizer), tokenizer, wanted)

    def of_texts(self, texts: TextSource, origin: Origin, wanted: Wanted) -> Samples:
        """Cut documents."""
        return self._cut(texts, origin.tokenizer(), wanted)

    def _cut(self, texts: TextSource, tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> Samples:
        return self.cut(
            texts,
            tokenizer,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=wanted.seed,
            fewer=wanted.fewer,
        )

    def check(self, samples: Samples, model: Any) -> None:
        """Refuse positions that the model doesn't have, and tokens outside its embeddings."""
        super().check(samples, model)
        ids = samples.inputs.get("input_ids")
        if ids is None:  # a caller's own inputs
            return
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        length, smallest, largest = ids.shape[1], int(ids.min()), int(ids.max())
        if positions is not None and 0 < positions < length:
            raise DataError(
                f"sequences of {length} tokens, and the model takes {positions}; give a --seq-len of at most that."
            )
        if smallest < 0:
            raise DataError(f"the data has token {smallest}; token ids are 0 or more.")
        rows = _rows(model)
        if rows is not None and largest >= rows:
            raise DataError(
                f"the data has token {largest}, and the model's embeddings have {rows} rows; is it its tokenizer?"
            )

    def probe(self, inputs: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """The first tokens of the first sample; all of it where more than tokens goes in (images have their places)."""
        found = self.batch(inputs, 0, 1, device).inputs
        if any(tensor.is_floating_point() for tensor in found.values()):
            return found
        return {name: tensor[:, :PROBE] for name, tensor in found.items()}

    def example(self, model: Any, origin: Origin | None = None) -> dict[str, Tensor] | None:
        """A few tokens with an end behind them, which some heads look for; a decoder begins with the same.

        A model of sound, or one whose tokens have no table, says nothing.
        """
        rows = _rows(model) if getattr(model, "main_input_name", "input_ids") == "input_ids" else None
        if rows is None:
            return None
        ends = getattr(model.config.get_text_config(), "eos_token_id", None)
        end = ends[0] if isinstance(ends, list) else ends
        ids = torch.arange(3, 3 + PROBE)[None] % rows
        if isinstance(end, int) and 0 <= end < rows:
            ids[0, -1] = end
        found = {"input_ids": ids}
        if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
            found["decoder_input_ids"] = ids
        return found

    def size(self, samples: Samples) -> Size:
        """Padding counts: it goes through the layers too."""
        ids = samples.inputs.get("input_ids")
        return super().size(samples) if ids is None else Size(*ids.shape)

    def tokenizer(self, origin: Origin) -> PreTrainedTokenizerBase:
        """The model's own."""
        return origin.tokenizer()


def _rows(model: Any) -> int | None:
    """How many tokens a model's embeddings have; None where it doesn't say which those are."""
    table: Any = input_embedding(model)
    return None if table is None else int(table.num_embeddings)
