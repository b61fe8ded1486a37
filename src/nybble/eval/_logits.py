"""Logits of a batch without ever holding them all.

A vocabulary is wide: 2048 tokens x 49152 float32 logits are 400 MB, per model. So the body of a model runs over the
batch, and its output head over a piece of the hidden states at a time, in the model's dtype. Models whose logits
are more than head(body(tokens)) are found out on a few tokens and run whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nybble.core.errors import DataError, ModelError
from nybble.core.products import product_dtype, products_in
from nybble.nn.config import config_of
from nybble.nn.in_place import evaluation_mode
from nybble.nn.kv_model import recorded_kv

LogitsOf = Callable[[int, int], Tensor]
"""(start, stop) -> logits [stop - start, V] of these predictions of the batch, in the model's dtype."""

_PROBE = 16  # tokens; enough to see a scale or an extra layer between body and head


class AnyPredictor(Protocol):
    """One model, asked for the logits of pieces of a batch, whatever it is called with.

    ``vocabulary``: logits of one prediction. ``itemsize``: bytes of one. ``device``: where they are made.
    """

    vocabulary: int
    itemsize: int
    device: torch.device

    def predict(self, given: Any, /) -> LogitsOf:
        """Run the model on a batch."""


class PairPredictor:
    """An encoder-decoder, called with mappings of ``input_ids`` [B, S] and ``decoder_input_ids`` [B, T].

    Args:
        model: gives ``logits`` [B, T, V].
        inputs: of all batches; the first few tokens of the first pair show the vocabulary.

    Raises:
        ModelError: no logits.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.model, self.device = model, _device(model)
        self._caches = recorded_kv(model) is not None  # judged with what is read back, as Predictor does
        shown = self.predict({name: tensor[:1, :_PROBE] for name, tensor in inputs.items()})(0, 1)
        self.vocabulary, self.itemsize = shown.shape[-1], shown.element_size()

    def predict(self, given: Mapping[str, Tensor], /) -> LogitsOf:
        """Run the model; the result gives logits of any piece of the B * T predictions, those of padding left out."""
        output = self.model(**{name: tensor.to(self.device) for name, tensor in given.items()}, use_cache=self._caches)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ModelError(
                f"{type(self.model).__name__} gives no logits over tokens, so its targets can't be judged."
            )
        real = given.get("decoder_attention_mask")
        flat: Tensor = logits.flatten(0, 1) if real is None else logits[real.bool().to(logits.device)]
        return lambda start, stop: flat[start:stop]


class Predictor:
    """One model, asked for the logits of pieces of a batch.

    Args:
        model: a causal language model called with ``input_ids`` [B, L]; gives logits [B, L, V], bare or as the
            ``logits`` of its output.
        tokens: int64 [N, L], all that will be asked: checked against the vocabulary, and the two ways of getting
            logits are compared on the first few.

    Raises:
        DataError: a token outside the model's vocabulary.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model = model
        self.device = _device(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        body = getattr(model, "base_model", model)
        config = config_of(model)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # A model that caches in few bits is judged with what a prompt reads back from there.
        self._options = {} if config is None else {"use_cache": recorded_kv(model) is not None}
        self._split = (body, head) if isinstance(head, nn.Module) and body is not model else None
        _check_range(tokens, getattr(config, "vocab_size", None))
        ids = tokens[:1, :_PROBE].to(self.device)
        whole = self._whole(ids)
        self.vocabulary = whole.shape[-1]
        self.itemsize = whole.element_size()
        if self._split is not None and not _same(self._logits(self._hidden(ids)), whole):
            self._split = None

    @property
    def in_pieces(self) -> bool:
        """Whether the head runs apart from the body; else the batch's logits are held whole."""
        return self._split is not None

    def predict(self, ids: Tensor) -> LogitsOf:
        """Run the body over [B, L]; the result gives logits of any piece of the B * (L - 1) predictions."""
        ids = ids.to(self.device)
        if self._split is None:
            logits = self._whole(ids)[:, :-1].flatten(0, 1)
            return lambda start, stop: logits[start:stop]
        hidden = self._hidden(ids)[:, :-1].flatten(0, 1)
        return lambda start, stop: self._logits(hidden[None, start:stop])[0]

    def _whole(self, ids: Tensor) -> Tensor:
        output = self.model(ids, **self._options)
        logits = output if isinstance(output, Tensor) else output.logits
        assert isinstance(logits, Tensor)
        return logits

    def _hidden(self, ids: Tensor) -> Tensor:
        assert self._split is not None
        hidden = self._split[0](ids, **self._options)[0]
        assert isinstance(hidden, Tensor)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self._split is not None
        logits: Tensor = self._split[1](hidden)
        if self._softcap is not None:  # Gemma 2, arXiv:2408.00118 section 2
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode without gradients, and each of their modules back at exit.

    Products of 16-bit floats run in float32 where a CPU is faster at it.
    """
    dtypes = {(p.device, p.dtype) for model in models for p in model.parameters()}
    wide = any(product_dtype(device, dtype) != dtype for device, dtype in dtypes)
    with evaluation_mode(*models), torch.no_grad(), products_in(torch.float32) if wide else nullcontext():
        yield


def _check_range(tokens: Tensor, vocabulary: int | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise DataError(
            f"tokens from {low} to {high} don't fit a vocabulary of {vocabulary}. Use the model's own tokenizer."
        )


def _device(model: nn.Module) -> torch.device:
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding: a forgotten scale or bias is far outside 1 %; NaN is never the same."""
    return left.shape == right.shape and bool((left - right).abs().max() <= 0.01 * right.abs().max())
