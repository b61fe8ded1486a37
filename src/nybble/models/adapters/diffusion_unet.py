"""U-Nets of diffusers (:mod:`nybble.models.own.diffusion_unet`), each one block that is learned in units.

Its units are residual blocks and attention blocks: what goes past them, over the skips, comes to each as it does in the
network. The first and the last convolution and the embeddings of timesteps, classes and texts stay in float.
"""

from __future__ import annotations

from nybble.models.adapter import Adapter

PART = Adapter(
    name="diffusion_unet",
    model_types=("nybble-diffusion-unet",),
    blocks="net",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="latents",
    convolutional=True,
    units=("ResnetBlock2D", "BasicTransformerBlock", "Attention"),
    kept=(
        "net.conv_in",
        "net.conv_out",
        "net.time_embedding.*",
        "net.class_embedding.*",
        "net.add_embedding.*",
        "net.encoder_hid_proj.*",
        "net.time_proj.*",
    ),
    limits=("factors can't be moved between layers: GroupNorms stand between them",),
)
