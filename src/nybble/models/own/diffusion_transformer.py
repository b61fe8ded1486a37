"""Diffusion transformers of diffusers: DiT (Peebles and Xie 2023), PixArt (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nybble.models.own._denoiser import Denoiser, DenoiserConfig


class DiffusionTransformerConfig(DenoiserConfig):  # type: ignore[no-untyped-call]
    """Of one of diffusers' transformers that call their blocks one after the other."""

    model_type = "nybble-diffusion-transformer"


class DiffusionTransformer(Denoiser):  # type: ignore[no-untyped-call]
    """``net`` is a DiT or a PixArt transformer."""

    config_class = DiffusionTransformerConfig
    classes = ("DiTTransformer2DModel", "PixArtTransformer2DModel")
    unsaid: ClassVar[Mapping[str, Any]] = {"resolution": None, "aspect_ratio": None}


PART = DiffusionTransformer
