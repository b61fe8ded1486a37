"""Transformers of diffusers whose blocks follow each other (:mod:`nybble.models.own.diffusion_transformer`).

In float stay what FP4DiT leaves in float: embeddings of patches, timesteps, classes and texts, and what stands behind
the blocks. The modulations (adaLN) inside the blocks are layers like others.
"""

from __future__ import annotations

from nybble.models.adapter import Adapter

KEPT = (
    *("net.pos_embed.*", "net.adaln_single.*", "net.caption_projection.*", "net.norm_out.*", "net.proj_out.*"),
    *("net.proj_out_1", "net.proj_out_2", "*.norm1.emb.*", "net.time_extra_emb.*", "net.text_embedder.*"),
)

PART = Adapter(
    name="diffusion_transformer",
    model_types=("nybble-diffusion-transformer",),
    blocks="net.transformer_blocks",
    embeddings=(),
    final_norm=None,
    head=None,
    reads="latents",
    kept=(*KEPT, "net.proj_out"),
    limits=("transforms that fold a norm into linears are off: a timestep's modulation stands between them",),
)
