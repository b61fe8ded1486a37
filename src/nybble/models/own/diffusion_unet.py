"""U-Nets of diffusers: unconditional and of classes (``UNet2DModel``), of text states (``UNet2DConditionModel``)."""

from __future__ import annotations

from nybble.models.own._denoiser import Denoiser, DenoiserConfig


class DiffusionUNetConfig(DenoiserConfig):  # type: ignore[no-untyped-call]
    """Of one of diffusers' U-Nets."""

    model_type = "nybble-diffusion-unet"


class DiffusionUNet(Denoiser):  # type: ignore[no-untyped-call]
    """``net`` is a U-Net."""

    config_class = DiffusionUNetConfig
    classes = ("UNet2DModel", "UNet2DConditionModel")


PART = DiffusionUNet
