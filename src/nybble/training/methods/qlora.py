"""QLoRA: LoRA of PEFT beside frozen, packed weights. Dettmers et al. 2023, arXiv:2305.14314.

A layer gives ``Y = X W + s X A B``, ``s = alpha / rank``, where W is dequantized when it is needed (with gradient
checkpointing in forward and again in backward, so that one block's is there at a time), B begins at 0, and only A and B
(float32) get gradients. Norms are frozen: transformers' calculate in float32 what needs it, and their weights stay as
the base has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, UsageError
from nybble.core.options import at_least_one
from nybble.core.seeds import derive_seed, preserve_global_rng
from nybble.nn.kinds import quant_modules
from nybble.nn.linear import QuantLinear
from nybble.training.methods import AdapterMethod, Given, Place

ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class QloraOptions:
    """Of the adapters; the defaults are Guanaco's.

    ``rank``: of A and B. ``alpha``: over the rank, what their product is scaled by. ``dropout``: of what enters (0.05
    from 33B parameters on). ``targets``: names of layers as they end (``q_proj``), or all linear layers but the head.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    targets: tuple[str, ...] = (ALL,)

    def __post_init__(self) -> None:
        at_least_one(rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; it must be 0 or more and below 1.")
        if not self.alpha > 0 or not self.targets:
            raise UsageError("alpha must be above 0, and targets name at least one layer.")


class Qlora(AdapterMethod):
    """``nybble train qlora``."""

    summary: ClassVar[str] = "LoRA adapters beside frozen, packed weights"
    options_type: ClassVar[type[Any]] = QloraOptions
    packs: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("language",)

    def needed(self) -> None:
        """PEFT, accelerate, and what PEFT's cards and our page are filled in with."""
        missing = [name for name in ("peft", "accelerate", "jinja2") if find_spec(name) is None]
        if missing:
            raise UsageError(f"training needs {' and '.join(missing)}: pip install 'nybble[train]'")

    def base_of(self, start: Path) -> str:
        """As the adapter's config says."""
        from nybble.training.adapters import config_of_adapter

        return str(config_of_adapter(start).base_model_name_or_path)

    def attach(self, model: nn.Module, given: Given) -> nn.Module:
        """As :class:`Method`; a ``start`` brings its own rank, alpha and targets."""
        import peft

        options: QloraOptions = given.options

        from nybble.training.adapters import load_adapter, with_adapter

        if not any(isinstance(layer, QuantLinear) for _, layer in quant_modules(model)):
            raise ModelError(f"no linear layer of this {type(model).__name__} is packed, so there is nothing to adapt.")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if given.start is not None:
            return _untied(load_adapter(model, given.start, trainable=True))
        targets = ALL if options.targets == (ALL,) else list(options.targets)
        config = peft.LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        with preserve_global_rng():
            torch.manual_seed(derive_seed(given.seed, "qlora", "A"))
            adapted = with_adapter(model, config, f"targets {', '.join(options.targets)}")
        if targets != ALL:
            _check_targets(adapted, options.targets)
        return _untied(adapted)

    def parts(self, model: nn.Module) -> dict[str, int]:
        """Packed weights, adapters, and what is neither."""
        packed = {id(t) for _, layer in quant_modules(model) for t in _tensors(layer) if not t.requires_grad}
        every = {id(t): t for t in _tensors(model)}
        found = {"adapters": 0, "base, packed": 0, "base, in float": 0}
        for key, t in every.items():
            name = "adapters" if t.requires_grad else "base, packed" if key in packed else "base, in float"
            found[name] += t.numel() * t.element_size()
        return found

    def save(self, model: nn.Module, place: Place) -> None:
        """A PEFT adapter."""
        adapted: Any = model
        config = adapted.peft_config["default"]
        config.base_model_name_or_path = place.base
        config.target_modules = sorted(config.target_modules)  # a set, whose order is another one in each process
        adapted.save_pretrained(place.folder, save_embedding_layers=False)

    def merged(self, model: nn.Module) -> nn.Module:
        """The base with each adapter beside its codes (:class:`~nybble.qtensor.low_rank_sum.LowRankSum`)."""
        adapted: Any = model
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
        return merged


def _check_targets(adapted: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse a name that is no layer's: beside one that is, PEFT passes over it."""
    made: Any = adapted
    found: list[str] = made.base_model.targeted_module_names
    idle = [each for each in targets if not any(name == each or name.endswith(f".{each}") for name in found)]
    if idle:
        raise ModelError(f"targets: no layer's name ends in {', '.join(idle)}; leave it out, or see nybble inspect.")


def _untied(adapted: nn.Module) -> nn.Module:
    """The model, unless a layer with an adapter shares its weight: merged, the other would have the adapter too."""
    made: Any = adapted
    users: dict[int, set[str]] = {}
    for name, p in made.get_base_model().named_parameters(remove_duplicate=False):
        users.setdefault(id(p), set()).add(name.rpartition(".")[0].removesuffix(".base_layer"))
    for name in made.base_model.targeted_module_names:
        others = next((some - {name} for some in users.values() if name in some), set())
        if others:
            raise ModelError(
                f"targets: {name} shares its weight with {', '.join(sorted(others))}, so an adapter beside it can't be "
                "merged; leave it out."
            )
    return adapted


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


PART = Qlora()
