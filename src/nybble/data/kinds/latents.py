"""What a denoiser is called with: noisy latents, how noisy they are, and what the image is to be of.

No file holds such samples: a diffusion model makes them, as it samples (:mod:`nybble.calibration.trajectory`). The
data that a user names is what its images are of: classes at random for ``builtin``, or a file with a prompt a line.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.core.errors import DataError, UsageError
from nybble.data.kinds import DataKind, Size
from nybble.data.samples import Origin, Samples, Wanted


class Latents(DataKind):
    """``latents``, float [samples, channels, rows, columns], ``timestep`` [samples], and conditions by name."""

    of_model: ClassVar[bool] = True

    def prepare(self, src: str, origin: Origin, wanted: Wanted) -> Samples:
        """Refuse every SRC: the model itself makes its samples."""
        raise UsageError(
            f"a diffusion model makes its inputs itself, as it samples; {src!r} can't be read without it. In Python, "
            "nybble.calibration.trajectory.trajectory_samples makes some for data=."
        )

    def check(self, samples: Samples, model: Any) -> None:
        """Refuse latents of other channels, and samples that don't say how noisy they are."""
        super().check(samples, model)
        latents, timestep = samples.inputs.get("latents"), samples.inputs.get("timestep")
        if latents is None or latents.dim() != 4 or timestep is None:
            came = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in samples.inputs.items())
            raise DataError(
                f"a denoiser takes latents [samples, channels, rows, columns], timestep [samples]; the data has {came}."
            )
        if not all(bool(t.isfinite().all()) for t in samples.inputs.values() if t.is_floating_point()):
            raise DataError(f"data {samples.source!r} holds NaN or infinity.")
        channels = model.config.channels
        if latents.shape[1] != channels:
            raise DataError(f"the latents have {latents.shape[1]} channels, and the model takes {channels}.")

    def real(self, inputs: Any) -> Tensor | None:
        """None: every place of an image is real."""
        return None

    def size(self, samples: Samples) -> Size:
        """A sample counts as many vectors as its latents have places."""
        shape = samples.inputs["latents"].shape
        return Size(shape[0], shape[2] * shape[3])

    def example(self, model: Any, origin: Origin | None = None) -> dict[str, Tensor] | None:
        """Latents of zeros, and a state of text of zeros where the network reads one; None of what needs more."""
        network, (rows, columns) = model.config.network, model.config.latent_size
        known = {
            "latents": torch.zeros(1, model.config.channels, rows or 32, columns or 32),
            "timestep": torch.zeros(1),
        }
        width = network.get("caption_channels") or network.get("cross_attention_dim")
        if "cross_attention_dim_t5" in network or isinstance(width, list | tuple):
            return None
        if network.get("num_class_embeds") or (network.get("num_embeds_ada_norm") and not width):
            known["class_labels"] = torch.zeros(1, dtype=torch.int64)
        if width:
            known["encoder_hidden_states"] = torch.zeros(1, 4, int(width))
        return known


PART = Latents()
