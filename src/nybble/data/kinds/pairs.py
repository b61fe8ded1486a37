"""Inputs and targets: what encoder-decoders read. :mod:`nybble.data.pairs` says how text becomes both."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from nybble.core.errors import ModelError
from nybble.core.guard import reading
from nybble.data.kinds._text import TextKind
from nybble.data.pairs import PairSamples, pair_samples
from nybble.data.samples import Samples


def decoder_input_ids(model: Any, labels: Tensor) -> Tensor:
    """What the decoder of ``model`` reads to predict ``labels``: made by the family's own code.

    Args:
        model: of transformers; may be on the meta device.
        labels: int64 [samples, tokens].

    Raises:
        ModelError: the family has no rule, or its config lacks what that needs (a pad or start token).
    """
    name = type(model).__name__
    with reading(f"the decoder's inputs of {name}", ModelError):
        for method in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
            if callable(made := getattr(model, method, None)):
                return _made(made(labels.clone()))
        shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
        if shift is None:
            raise ModelError(f"{name} has no rule for what its decoder reads; give samples with decoder_input_ids.")
        config = model.config
        start = [config.decoder_start_token_id] if len(inspect.signature(shift).parameters) > 2 else []
        return _made(shift(labels.clone(), config.pad_token_id, *start))


def _made(ids: Any) -> Tensor:
    assert isinstance(ids, Tensor)
    return ids


class Pairs(TextKind):
    """``input_ids`` and, once a model has seen them, ``decoder_input_ids``, int64 [samples, tokens]."""

    def fitted(self, samples: Samples, model: Any) -> Samples:
        """With the decoder's inputs; those of a caller's own samples stay."""
        if not isinstance(samples, PairSamples) or samples.decoder_input_ids is not None:
            return samples
        return replace(samples, decoder_input_ids=decoder_input_ids(model, samples.labels))


PART = Pairs(cut=pair_samples)
