"""Hunyuan-DiT of diffusers (Li et al. 2024): a transformer whose late blocks also read what early ones gave."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from nybble.models.own._denoiser import Denoiser, DenoiserConfig


class HunyuanDitConfig(DenoiserConfig):  # type: ignore[no-untyped-call]
    """Of the transformer."""

    model_type = "nybble-hunyuan-dit"


class HunyuanDit(Denoiser):  # type: ignore[no-untyped-call]
    """``net`` is the transformer; the rotary table of a size of latents is made as its pipeline makes it."""

    config_class = HunyuanDitConfig
    classes = ("HunyuanDiT2DModel",)

    def more(self, latents: Tensor) -> dict[str, Any]:
        """``image_rotary_emb``: of the grid of patches, relative to the one of 512 pixels."""
        embeddings = importlib.import_module("diffusers.models.embeddings")
        network = self.config.network
        patch, heads = int(network.get("patch_size") or 2), int(network["attention_head_dim"])
        rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
        base, longer = 512 // 8 // patch, max(rows, columns)
        sides = round(base * rows / longer), round(base * columns / longer)
        start = round((base - sides[0]) / 2), round((base - sides[1]) / 2)
        corners = (start, (start[0] + sides[0], start[1] + sides[1]))
        where = {"device": latents.device, "output_type": "pt"}
        return {"image_rotary_emb": embeddings.get_2d_rotary_pos_embed(heads, corners, (rows, columns), **where)}


PART = HunyuanDit
