"""The convolutional speech recognizers (:mod:`nybble.models.own.recognizer`), one block."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="recognizer",
    model_types=("nybble-recognizer",),
    blocks="net",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="speech",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions",),
)
