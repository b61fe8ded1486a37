"""Convolutional networks of timm, through transformers' wrapper: EfficientNet-Lite, MobileNets, ResNets and others.

Everything that timm calls a model is wrapped in one class; here it is one block, with its classifier inside. Layers are
quantized as they are found: of a vision transformer in the wrapper, its linears and patch embedding.
"""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="timm",
    model_types=("timm_wrapper",),
    blocks="timm_model",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="images",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions, ReLU6 is not homogeneous",),
)
