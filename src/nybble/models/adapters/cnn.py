"""Convolutional networks of transformers, each one block: ResNet, MobileNetV2; nybble's own; timm.py has many more."""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="cnn",
    model_types=("resnet", "mobilenet_v2", "nybble-microcontroller", "nybble-chain", "nybble-cells"),
    blocks="{base}",
    embeddings=(),
    final_norm=None,
    head="classifier",
    reads="images",
    convolutional=True,
    limits=("factors can't be moved between layers: BatchNorms go into their convolutions, ReLU6 is not homogeneous",),
)
