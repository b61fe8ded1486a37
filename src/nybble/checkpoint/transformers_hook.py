"""The quantizer that ``transformers.AutoModelForCausalLM.from_pretrained(OUT)`` calls after ``import nybble``.

Only hooks that transformers 5.17 and 5.24 share are overridden. Before weights are loaded every described module is
replaced by its empty quantized version, whose buffers have the checkpoint's names, shapes and dtypes; then the ordinary
loader fills them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble.checkpoint.describe import FORMAT_VERSION, check_version, describe_model, fit_cache, fit_to, restore_model
from nybble.checkpoint.save import keep_names
from nybble.models.build.skeleton import keep_float32_
from nybble.nn.kinds import describe
from nybble.nn.kinds.tied import tie_to_quantized
from nybble.nn.kv_model import from_json
from nybble.nn.layouts import Layouts
from nybble.nn.packed import end_offer, offer_offloading, validate_packed


@register_quantization_config("nybble")
class NybbleConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json.

    Args:
        modules: name -> description of a quantized module. layouts: what the descriptions number.
        format_version: of the file. kv: what the model caches in. rest: versions and the like, kept as they came.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        layouts: list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        kv: str | dict[str, str] | None = None,
        **rest: Any,
    ) -> None:
        self.quant_method: Any = "nybble"
        check_version({"modules": modules, "layouts": layouts, "format_version": format_version})
        self.modules, self.layouts, self.format_version = modules or {}, layouts or [], format_version
        self.kv = kv
        self.rest = {k: v for k, v in rest.items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {
            "quant_method": "nybble",
            "format_version": self.format_version,
            **self.rest,
            "layouts": self.layouts,
            "modules": self.modules,
            **({} if self.kv is None else {"kv": self.kv}),
        }


@register_quantizer("nybble")
class NybbleHfQuantizer(HfQuantizer):
    """Loads checkpoints that nybble wrote; it quantizes nothing itself (``nybble quantize`` does)."""

    requires_calibration = True
    quantization_config: NybbleConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beside nybble is needed."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        described = self.quantization_config
        keep_float32_(model)
        # The loader follows the tensors' own dtypes. By the family's patterns it would widen 16-bit scales, too.
        model._keep_in_fp32_modules = model._keep_in_fp32_modules_strict = frozenset()
        # What is saved again has the names that it has here.
        described.modules, described.kv = fit_to(model, described.modules), fit_cache(model, described.kv)
        ties = dict(model.all_tied_weights_keys)
        restore_model(model, described.modules, described.layouts, from_json(described.kv))
        tied = tie_to_quantized(model, ties)
        described.modules |= {name: describe(model.get_submodule(name), Layouts()) for name in tied}
        if kwargs.get("device_map") is not None:
            offer_offloading(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """None: a folder has the names that the model had, and some families' would be changed a second time."""
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        end_offer(model)
        validate_packed(model)
        keep_names(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the same tensors again."""
        return True

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[None, dict[str, Any]]:
        """Nothing; asked before config.json is written, so that it describes anew what adapters were merged into."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only the adapters are written
            model.config.quantization_config = NybbleConfig(**describe_model(model))
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers are; the codes are fixed."""
        return True
