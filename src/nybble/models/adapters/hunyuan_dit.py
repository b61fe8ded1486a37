"""Hunyuan-DiT (:mod:`nybble.models.own.hunyuan_dit`): as other diffusion transformers, with skips between blocks."""

from __future__ import annotations

from dataclasses import replace

from nybble.models.adapters.diffusion_transformer import PART as TRANSFORMER

PART = replace(TRANSFORMER, name="hunyuan_dit", model_types=("nybble-hunyuan-dit",), blocks="net.blocks")
