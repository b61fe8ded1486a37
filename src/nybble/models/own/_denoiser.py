"""A denoiser of diffusers (the transformer or U-Net of a pipeline) as a transformers model, by its own config.

``network`` of the config is what diffusers wrote in the denoiser's config.json. The module itself stands at ``net``, so
tensors have the names that diffusers gives them, and a pipeline takes ``model.net`` as its own component.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from nybble.core.errors import ModelError, UsageError

ADDED = ("resolution", "aspect_ratio", "text_embeds", "time_ids")
"""Conditions that diffusers wants in a mapping of their own, ``added_cond_kwargs``."""


def diffusers() -> Any:
    """The package, imported when a diffusion model is first asked for.

    Raises:
        UsageError: it isn't installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError("models of diffusers need that package: pip install 'nybble[diffusion]'.")
    return importlib.import_module("diffusers")


class DenoiserConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """``network``: diffusers' own config of the denoiser, with ``_class_name``."""

    def __init__(self, network: Mapping[str, Any] | None = None, **more: Any) -> None:
        self.network = dict(network or {})
        super().__init__(**more)

    @property
    def denoiser(self) -> str:
        """The class in diffusers."""
        return str(self.network.get("_class_name", ""))

    @property
    def channels(self) -> int:
        """Of the latents (or pixels) that it denoises."""
        return int(self.network.get("in_channels") or 0)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents that it was made for; 0 where its config says none."""
        size = self.network.get("sample_size") or 0
        rows, columns = size if isinstance(size, list | tuple) else (size, size)
        return int(rows), int(columns)


@dataclass
class Denoised(ModelOutput):
    """``logits``: what the network tells of the noise (or of what its scheduler wants), [samples, channels, h, w]."""

    logits: Tensor | None = None


class Denoiser(PreTrainedModel):  # type: ignore[no-untyped-call]
    """See the module; each kind of denoiser is a subclass that says which classes of diffusers it holds."""

    config_class: Any = DenoiserConfig
    main_input_name = "latents"
    base_model_prefix = "net"
    classes: ClassVar[tuple[str, ...]] = ()
    unsaid: ClassVar[Mapping[str, Any]] = {}
    """Of ``added_cond_kwargs`` what the network wants to be told of, even where there is nothing to tell."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.net: nn.Module = made_of(config.network, self.classes)
        self.takes = frozenset(inspect.signature(self.net.forward).parameters)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights begin as diffusers draws them; the position table, which no file has, is computed."""
        if type(module).__name__ == "PatchEmbed" and "pos_embed" in module._non_persistent_buffers_set:
            fill_positions_(module)

    def forward(self, latents: Tensor, timestep: Tensor, **conditions: Any) -> Denoised:
        """One call of the network.

        Args:
            latents: float [samples, channels, rows, columns].
            timestep: [samples], of the noise in each.
            conditions: by diffusers' names, samples in front: ``class_labels``, ``encoder_hidden_states``, ...
        """
        added = {name: conditions.pop(name) for name in ADDED if name in conditions}
        known = {name: value for name, value in conditions.items() if name in self.takes}
        if "added_cond_kwargs" in self.takes:
            known["added_cond_kwargs"] = {**self.unsaid, **added}
        known |= self.more(latents)
        return Denoised(logits=self.net(latents, timestep=timestep, **known, return_dict=False)[0])

    def more(self, latents: Tensor) -> dict[str, Any]:
        """Further arguments, which follow from the size of the latents."""
        return {}


def made_of(network: Mapping[str, Any], classes: tuple[str, ...]) -> nn.Module:
    """A denoiser without weights of its own yet, as diffusers makes it of its config; no code of the folder runs.

    Raises:
        ModelError: another class, or arguments that it doesn't take.
    """
    name = str(network.get("_class_name"))
    found = getattr(diffusers(), name, None) if name in classes else None
    if found is None:
        raise ModelError(f"{name!r} is no denoiser of diffusers that is known here; there are {', '.join(classes)}.")
    arguments = {key: value for key, value in network.items() if not key.startswith("_")}
    taken = set(inspect.signature(found.__init__).parameters)
    if unknown := sorted(arguments.keys() - taken):
        raise ModelError(f"config.json of {name} has {unknown[0]!r}, which the installed diffusers doesn't know.")
    try:
        net: nn.Module = found(**arguments)
    except (TypeError, ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"diffusers can't make a {name} of its config.json: {error}.") from error
    return net


def fill_positions_(patches: Any) -> None:
    """Give a ``PatchEmbed`` the table of sines that it begins with, as diffusers computes it."""
    embeddings = importlib.import_module("diffusers.models.embeddings")
    rows = int((patches.height * patches.width) ** 0.5)
    table = embeddings.get_2d_sincos_pos_embed(
        patches.proj.out_channels, rows, base_size=patches.base_size, interpolation_scale=patches.interpolation_scale,
        output_type="pt", device=torch.device("cpu"),
    )  # fmt: skip
    patches.pos_embed = table.float().unsqueeze(0)
