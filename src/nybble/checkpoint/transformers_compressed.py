"""Folders of nybble's in compressed-tensors' form, opened by transformers where that library is missing.

With the library transformers opens them as it opens everybody's. Without it ``from_pretrained`` would stop at once;
after ``import nybble`` it loads what is in float, and nybble its own packed layers, by nybble.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.utils.import_utils import is_compressed_tensors_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble.checkpoint.describe import places
from nybble.checkpoint.marked import COMPRESSED, kept_beside
from nybble.checkpoint.read import Tensors, read_checkpoint
from nybble.checkpoint.transformers_hook import NybbleConfig, NybbleHfQuantizer
from nybble.models.build.config_file import read_json


class CompressedConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json, as it came."""

    def __init__(self, **stated: Any) -> None:
        self.quant_method: Any = COMPRESSED
        self.stated = {key: value for key, value in stated.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"quant_method": COMPRESSED, **self.stated}


class CompressedHfQuantizer(NybbleHfQuantizer):
    """Puts nybble's layers into the model, and fills them once the rest is loaded."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or [""]
        folder = Path(files[0]).parent
        if kept_beside(folder, read_json(folder / "config.json")) is None:
            raise ImportError(
                "compressed-tensors' checkpoints need that library in transformers (pip install compressed-tensors), "
                "but for those that nybble wrote, with their nybble.json beside them, which from_pretrained doesn't "
                "fetch from the hub (hf download does); nybble.load opens them all."
            )
        with torch.device("cpu"):  # the loader builds on the meta device
            checkpoint = read_checkpoint(folder)
        assert checkpoint.compressed is not None
        self._checkpoint, made = checkpoint, checkpoint.compressed
        described = checkpoint.config["quantization_config"]
        self.quantization_config = NybbleConfig(**{k: v for k, v in described.items() if k != "quant_method"})
        super()._process_model_before_weight_loading(model, **kwargs)
        own = model.state_dict().keys()
        names = [name for name in checkpoint.stored if name in made]
        self._filled = {name: place for name in names for place in places(model, name) if place in own}
        for kind, known in (("missing", self._filled.values()), ("unexpected", made.roles)):
            ignored = "|".join(f"{re.escape(name)}$" for name in known)  # nybble reads them, not the loader
            setattr(model, f"_keys_to_ignore_on_load_{kind}", {ignored} if ignored else set())

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        tensors = Tensors(self._checkpoint)
        for name, place in self._filled.items():
            owner, _, leaf = place.rpartition(".")
            module = model.get_submodule(owner)
            old = module.get_buffer(leaf)
            module._buffers[leaf] = tensors.get(name).to(old.device)
        return super()._process_model_after_weight_loading(model, **kwargs)


def register() -> None:
    """Have transformers use these, unless it has the library."""
    if not is_compressed_tensors_available():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED] = CompressedConfig
        auto.AUTO_QUANTIZER_MAPPING[COMPRESSED] = CompressedHfQuantizer


register()
