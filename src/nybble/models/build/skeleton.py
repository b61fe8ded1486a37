"""A model without its weights: parameters on the meta device, the small computed buffers real.

Rotary frequencies, embedding scales and the like are *non-persistent* buffers: no checkpoint stores them, the model
computes them; so it does a few parameters that it never saves (Marian's positions). On the meta device they have no
values, so each is computed again here by the model's own initialiser, as transformers does after loading.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nybble.core.errors import ModelError
from nybble.core.guard import reading
from nybble.models.own import own_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_BUFFER_BYTES = 1 << 30


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class named in ``config.architectures``, else the causal language model of the model type.

    Raises:
        ModelError: transformers has no such class, or it belongs to another model type.
    """
    import transformers

    names: Any = config.architectures
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"architectures is {names!r}; a list of class names is needed.")
    if names:
        found: Any = getattr(transformers, names[0], None) or own_class(names[0])
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if not is_model or not isinstance(config, getattr(found, "config_class", None) or ()):
            raise ModelError(f"architecture {names[0]!r} is not a transformers class for {config.model_type!r} models.")
        return cast("type[PreTrainedModel]", found)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal:
        raise ModelError(f"config names no architecture, and {config.model_type!r} has no causal language model.")
    return cast("type[PreTrainedModel]", causal[type(config)])


def base_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The model type's class without a head, where it has just one."""
    import transformers

    found: Any = transformers.MODEL_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, stored: Collection[str]) -> PreTrainedModel:
    """Build the model of ``config`` with every tensor on the meta device, in eval mode.

    Args:
        config: not changed; the model gets a copy.
        dtype: of the parameters.
        stored: names of the tensors that the checkpoint has. A model with more layers than those is a lie, and building
            it could take for ever. An optional pooler is there where one of them is of it.

    Attention is transformers' default for the class: ``scaled_dot_product_attention`` where that is supported, else
    eager; the config can't ask for another (:mod:`nybble.models.build.config_file`). Capped logits (Gemma 2) need
    eager: sdpa has no cap, and some transformers versions let it run without.
    """
    layers: Any = getattr(config, "num_hidden_layers", 0) or 0
    if isinstance(layers, dict):  # LXMERT's, of its three encoders
        layers = sum(count for count in layers.values() if isinstance(count, int))
    if not isinstance(layers, int) or layers > max(len(stored), 1):
        raise ModelError(f"config says {layers} layers, and the file has {len(stored)} tensors in all.")
    cls: Any = model_class(config)
    with reading(f"a {cls.__name__} of this config", ModelError), torch.device("meta"), _Undrawn():
        capped = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        pooled = not has_optional_pooler(config) or any("pooler." in n for n in stored)
        bare = {} if pooled else {"add_pooling_layer": False}
        model: PreTrainedModel = cls._from_config(copy.deepcopy(config), dtype=dtype, **capped, **bare)
    keep_float32_(model)
    nn.Module.eval(model)
    return model


def has_optional_pooler(config: PreTrainedConfig) -> bool:
    """Whether the class of :func:`model_class` builds a pooler unless it is told not to."""
    return "add_pooling_layer" in inspect.signature(model_class(config)).parameters


class _Undrawn(TorchFunctionMode):
    """Initial weights are not drawn: on the meta device that changes nothing, and takes most of a model's making."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def kept_float32(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that a family keeps in float32 when the model is in 16 bits, as transformers loads it.

    T5's ``wo`` in float16, say, whose products would overflow.
    """
    any_model: Any = model
    plan = any_model._get_dtype_plan(any_model.dtype) if hasattr(model, "_get_dtype_plan") else {}  # not torch's own
    if not plan:
        return frozenset()
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
    return frozenset(name for name in model.state_dict() if kept.search(name))


def keep_float32_(model: PreTrainedModel) -> None:
    """Give those of a meta model that dtype; what they are filled with is to have it, too."""
    kept = kept_float32(model)
    tensors = expected_tensors(model) if kept else {}
    for name in kept:
        tensors[name].data = tensors[name].data.float()


def unsaved(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters that ``save_pretrained`` leaves out, since the model computes them."""
    ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return ignored & model.state_dict().keys() if ignored else ignored


def fill_buffers_(model: PreTrainedModel) -> None:
    """Give each non-persistent buffer and each unsaved parameter of a meta model its value, on the CPU.

    Raises:
        ModelError: they would take more than 1 GiB, so the config is wrong.
    """
    from transformers import PreTrainedModel

    names = [name for name, _ in model.named_non_persistent_buffers()]
    parameters = sorted(unsaved(model))
    size = sum(model.get_buffer(name).nbytes for name in names) + sum(
        model.get_parameter(name).nbytes for name in parameters
    )
    if size > MAX_BUFFER_BYTES:
        raise ModelError(f"the config asks for {size} bytes of computed buffers; that is not believable.")
    with reading("the model's computed buffers", ModelError), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[leaf] = torch.zeros_like(module.get_buffer(leaf), device="cpu")
        for name in parameters:
            owner, _, leaf = name.rpartition(".")
            empty = torch.zeros_like(model.get_parameter(name), device="cpu")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        for path in _with_parents(name.rpartition(".")[0] for name in (*names, *parameters)):
            parts = path.split(".") if path else []
            above = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1))
            nearest: Any = next(m for m in above if isinstance(m, PreTrainedModel))
            # Parameters are still on meta, where drawing random values does nothing.
            nearest._init_weights(model.get_submodule(path))


def _with_parents(paths: Iterable[str]) -> list[str]:
    """The modules and those above them, innermost first: some families set a buffer from far above (Falcon H1)."""
    found = {path[:end] for path in paths for end in (0, *(i for i, c in enumerate(path) if c == "."), len(path))}
    return sorted(found, key=lambda path: (path == "", -path.count(".")))


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A skeleton of the same modules in new objects, so that others can stand in their places; a tenth of the making.

    It is to be looked at and to have modules replaced. It has the tensors of ``model``, which nobody fills, and parts
    that modules hold otherwise than as modules (functions, their configs) are shared.

    Args:
        model: on the meta device, without hooks.
    """
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        found = made.get(id(module))
        if found is None:
            found = made[id(module)] = module.__new__(type(module))
            vars(found).update(vars(module))
            for held in ("_parameters", "_buffers"):
                vars(found)[held] = dict(vars(module)[held])
            vars(found)["_modules"] = {
                name: None if part is None else copied(part) for name, part in module._modules.items()
            }
        return found

    return cast("PreTrainedModel", copied(model))


def expected_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything a checkpoint of ``model`` has to supply: parameters and persistent buffers, ties listed each."""
    return dict(model.state_dict(keep_vars=True))
