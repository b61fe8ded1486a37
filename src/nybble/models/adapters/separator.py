"""The network that separates voices (:mod:`nybble.models.own.separator`): its masks are one block."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="separator",
    model_types=("nybble-separator",),
    blocks="masks",
    embeddings=("encoder",),
    final_norm=None,
    head="decoder",
    reads="tensors",
    convolutional=True,
    limits=("factors can't be moved between layers: normalisation is over all channels and frames",),
)
