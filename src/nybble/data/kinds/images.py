"""Images in the size and normalisation of a model. :mod:`nybble.data.images` says which files hold some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.images import ImageSamples, Preparation, image_samples, preparation_for
from nybble.data.kinds import DataKind
from nybble.data.labelled import class_names
from nybble.data.samples import Origin, Samples, Wanted

_DONE = {"calibration": "calibrated", "evaluation": "judged"}


class Images(DataKind):
    """``pixel_values``, float32 [samples, channels, height, width]."""

    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> ImageSamples:
        """Read an IDX file, an array or a folder of pictures; nothing is built in."""
        if src == "builtin":
            raise UsageError(
                f"a vision model is {_DONE[wanted.part]} on images; give them with --data "
                "(an IDX file, .npy, .npz, a folder)."
            )
        wants = preparation_for(origin.config, origin.preprocessing())
        return image_samples(
            src, wants, samples=wanted.samples, seed=wanted.seed, fewer=wanted.fewer, classes=class_names(origin.config)
        )

    def check(self, samples: Samples, model: Any) -> None:
        """Refuse other inputs, and images with other channels than the model's."""
        super().check(samples, model)
        pixels = samples.inputs.get("pixel_values")
        if pixels is None or pixels.dim() != 4:
            came = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in samples.inputs.items())
            raise DataError(
                "a model of images takes pixel_values [samples, channels, height, width]; the data has "
                f"{came}. nybble.data.image_samples makes them."
            )
        channels = getattr(model.config, "num_channels", None)
        if channels is not None and pixels.shape[1] != channels:
            raise DataError(f"the images have {pixels.shape[1]} channels, and the model takes {channels}.")

    def example(self, model: Any, origin: Origin | None = None) -> dict[str, Tensor] | None:
        """One black image; where the config names no size, the network takes any. Plain networks say nothing."""
        try:
            wants = preparation_for(model.config, {} if origin is None else origin.preprocessing())
        except DataError:
            channels = getattr(model.config, "num_channels", None)
            if channels is None:
                return None
            wants = Preparation(height=64, width=64, channels=channels)
        return {"pixel_values": torch.zeros(1, wants.channels, wants.height, wants.width, dtype=torch.float32)}


PART = Images()
