"""LoRA of PEFT on packed layers: ``peft.get_peft_model(model, LoraConfig(...))`` after ``import nybble``.

PEFT knows a layer's LoRA by the layer's class, and lets others add classes only config by config, which a saved adapter
forgets. So its last resort, and what it takes for linear, learn about :class:`~nybble.nn.linear.QuantLinear` here.

The codes are fixed; adapters train on top. Merged, an adapter is exact: the packed weight becomes itself plus a product
of two thin matrices (:class:`~nybble.qtensor.low_rank_sum.LowRankSum`), never rounded again. Where the layer rounds its
inputs, the adapter sees them as they come, and a merged one as they are rounded.
"""

from __future__ import annotations

import inspect
import warnings
from functools import wraps
from typing import Any

import peft.tuners.lora.model as lora_model
import peft.tuners.tuners_utils as tuners
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from nybble.core.errors import SchemeError
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.qtensor.low_rank_sum import LowRankSum

BESIDE = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin (``init_lora_weights``) that leave the base weight as it is."""


class PackedLoraLinear(Linear):  # type: ignore[misc]  # PEFT has no types; it knows layers of its own by "Linear"
    """LoRA beside a quantized linear layer; arguments as of PEFT's own layers.

    Raises:
        SchemeError: a variant, or a way to begin, that would change the packed weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config.fan_in_fan_out = False  # [out, in], whatever the float layer had
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone: the others read or change a float weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        if config.init_lora_weights not in BESIDE:
            raise SchemeError(
                f"init_lora_weights={config.init_lora_weights!r} begins by changing the base weight, and this one is "
                f"packed; use one of {', '.join(map(repr, BESIDE))}."
            )
        if getattr(config, "use_qalora", False):
            raise SchemeError(
                "use_qalora=True folds an adapter into the zero points of GPTQ's layers; nybble keeps a merged one "
                "beside the codes, exactly. Leave it out."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weight, beside its codes: float32, in the adapter's own precision.

        Raises:
            ValueError: ``safe_merge``, and an adapter holds NaN or Inf.
        """
        layer = self.get_base_layer()
        if not isinstance(layer.weight, Packed):
            super().merge(safe_merge, adapter_names)
            return
        for name in tuners.check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            a, b = self.lora_B[name].weight.detach() * self.scaling[name], self.lora_A[name].weight.detach().clone()
            b = layer.enters(b)  # the adapter sees the input as it comes, the weight may see it rotated
            if safe_merge and not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._shift_bias(name, 1)
            layer.weight = Packed(LowRankSum(layer.weight.qtensor(), a, b), layer.weight.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Let go of merged adapters, last first; the codes are what they were."""
        layer = self.get_base_layer()
        if not isinstance(layer.weight, Packed):
            super().unmerge()
            return
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            found = layer.weight.qtensor()
            assert isinstance(found, LowRankSum)
            layer.weight = Packed(found.base, layer.weight.dtype)
            self._shift_bias(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _shift_bias(self, name: str, sign: int) -> None:
        if not self.lora_bias[name]:
            return
        bias = self.get_base_layer().bias
        if bias is None:
            raise SchemeError(
                "lora_bias=True can't be merged into a layer without a bias; leave the adapter beside it."
            )
        bias += sign * self.scaling[name] * self.lora_B[name].bias


def _packed_names(model: nn.Module, classifies: bool) -> set[str]:
    """Packed layers that "all-linear" means: no head, nothing inside what already has an adapter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {head, *(getattr(model, name, None) for name in tuners.SEQ_CLS_HEAD_NAMES if head is None and classifies)}
    layers = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
    packed = {name for name, m in model.named_modules() if isinstance(m, QuantLinear) and m not in heads}
    return {name for name in packed if not any(name.startswith(f"{layer}.") for layer in layers)}


def register() -> None:
    """Let PEFT meet quantized linear layers.

    A PEFT whose layers are made in another way (before 0.21) is left alone: it says that it doesn't know the layer.
    """
    dispatch, include = lora_model.dispatch_default, tuners._maybe_include_all_linear_layers
    if "config" not in inspect.signature(dispatch).parameters:
        return

    @wraps(dispatch)
    def dispatch_packed(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, tuners.BaseTunerLayer) else target
        if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
            return PackedLoraLinear(target, adapter_name, config, **kwargs)
        made: nn.Module | None = dispatch(target, adapter_name, config=config, **kwargs)
        return made

    @wraps(include)
    def include_packed(config: Any, model: nn.Module) -> Any:
        wanted = getattr(config, "target_modules", None)
        found = include(config, model)
        if isinstance(wanted, str) and wanted.lower() == tuners.INCLUDE_LINEAR_LAYERS_SHORTHAND:
            found.target_modules = {*found.target_modules, *_packed_names(model, found.task_type == "SEQ_CLS")}
        return found

    lora_model.dispatch_default = dispatch_packed
    tuners._maybe_include_all_linear_layers = include_packed


register()
