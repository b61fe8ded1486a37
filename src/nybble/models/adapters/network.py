"""Plain torch networks over images (:mod:`nybble.models.network`), each one block."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="network",
    model_types=("image_network",),
    blocks="net",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="images",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions, ReLU6 is not homogeneous",),
)
