"""The detector (:mod:`nybble.models.own.detector`), one block."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="detector",
    model_types=("nybble-detector",),
    blocks="net",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="images",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions",),
)
