"""Plain torch networks (:mod:`nybble.models.network`), each one block."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="network",
    model_types=("plain_network",),
    blocks="net",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="tensors",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions, ReLU6 is not homogeneous",),
)
