"""A model that caches in few bits by itself: in ``generate``, and in every forward with ``use_cache``.

What a model records is a :class:`~nybble.kv_format.KVFormat`, or one for each attention by name. It hangs on the model
as hooks, so that nothing of it is a parameter or a module: ``save_pretrained``, ``copy.deepcopy`` and wrappers keep
what they had, and a cache that the caller passes is used as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from nybble.core.errors import FileError, ModelError, NybbleError, SchemeError, UsageError, within
from nybble.kv_format import KVFormat, one_scale
from nybble.nn.attention import attentions
from nybble.nn.cached_attention import use_cached_attention
from nybble.nn.config import config_of
from nybble.nn.kv_basis import Orders, check_sortable, order_of
from nybble.nn.kv_rows import check_width
from nybble.scheme import Rule, Scheme

KVRecord = KVFormat | Mapping[str, KVFormat]
"""One format for all layers, or attention module's name -> format (others cache in float)."""

_PREPARE = "_prepare_cache_for_generation"
_NAMES = ("cache", "past_key_values")  # of the argument: since transformers 5.24, and before


class CacheHook:
    """Gives a forward that would make a cache a quantized one.

    Args:
        config: of the model. kv: what it records. formats: the same, by number of the layer.
    """

    def __init__(self, config: Any, kv: KVRecord, formats: KVFormat | Mapping[int, KVFormat]) -> None:
        self.config, self.kv, self.formats = config, kv, formats
        self._orders: dict[int, Orders] | None = None

    def make(self, model: nn.Module | None = None) -> Any:
        """An empty cache; of sorted channels one for a model, or its body, whose weights are looked at once."""
        from nybble.nn.kv_cache import make_cache

        if model is not None and self._orders is None:
            self._orders = _orders(model, self.formats)
        return make_cache(self.config, self.formats, self._orders)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: fills in the cache where the module would make one."""
        names = _takes(type(module))
        given = dict(zip(names, args, strict=False)) | kwargs
        wanted = given.get("use_cache")
        if wanted is None:
            wanted = getattr(config_of(module), "use_cache", False)
        checkpointed = module.training and getattr(module, "is_gradient_checkpointing", False)  # these cache nothing
        if _given(given) or not wanted or checkpointed:
            return None
        name = cache_argument(type(module))
        place = names.index(name)
        kept = {key: value for key, value in kwargs.items() if key not in _NAMES}  # a None by its other name
        if place < len(args):
            return (*args[:place], self.make(module), *args[place + 1 :]), kept
        return args, {**kept, name: self.make(module)}


def use_quantized_cache(model: Any, kv: KVRecord | None) -> None:
    """Let a model cache keys and values in few bits, or with None in float again.

    ``generate`` and forwards with ``use_cache`` then make a quantized cache where they made a dynamic one. Static and
    offloaded caches (``cache_implementation``) are refused, caches that the caller gives used as they are. A
    forward with ``use_cache=False`` caches nothing and rounds nothing.

    Args:
        model: a transformers model that generates.
        kv: one format, or one a name of an attention module.

    Raises:
        ModelError: a model without such a cache, or without a module that is named. UsageError: scales that are still
            to be calibrated.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, CacheHook):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    model.__dict__.pop(_PREPARE, None)
    use_cached_attention(model, kv is not None)
    if kv is None:
        return
    check_cache(model, kv)
    found = next((one for one in ([kv] if isinstance(kv, KVFormat) else kv.values()) if one.static), None)
    if found is not None:
        raise UsageError(f"the KV cache {found} has no scales yet; quantize with it on calibration data finds them.")
    hook = CacheHook(model.config, kv, layer_formats(model, kv))
    for module in model.modules():
        # Not the root alone: evaluation calls the body by itself.
        takes = cache_argument(type(module)) and "use_cache" in _takes(type(module))
        if takes and config_of(module) is not None:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    setattr(model, _PREPARE, MethodType(_prepare_cache, model))


def recorded_kv(model: nn.Module) -> KVRecord | None:
    """What :func:`use_quantized_cache` was given; None if nothing."""
    hook = _hook(model)
    return None if hook is None else hook.kv


def _hook(model: nn.Module) -> CacheHook | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook)), None)


def check_cache(model: Any, kv: KVRecord) -> None:
    """Check, before anything runs, that the model can cache so; its weights may be on the meta device.

    Raises:
        ModelError: it generates no text with a cache of keys and values, or caches more than these; or what makes its
            keys or values can't be sorted by.
        GranularityError: heads of another width than the quantizer's groups divide; names the sizes that do.
    """
    generates = getattr(model, "can_generate", lambda: False)()
    if not generates or not model._supports_default_dynamic_cache() or not cache_argument(type(model)):
        raise ModelError(f"{type(model).__name__} generates no text with a cache of keys and values; leave kv out.")
    CacheHook(model.config, kv, layer_formats(model, kv)).make()
    config = model.config.get_text_config(decoder=True)
    default: Any = getattr(config, "head_dim", None)
    if default is None and hasattr(config, "num_attention_heads"):
        default = config.hidden_size // config.num_attention_heads
    if hasattr(config, "kv_lora_rank"):
        default = None  # latent attention: keys and values of two widths, seen when the first token comes
    for name, kept in _named(model, kv).items():
        check_sortable(model.get_submodule(name), name, kept.sort)
    named = {"": kv} if isinstance(kv, KVFormat) else kv
    for name, found in named.items():
        width = getattr(model.get_submodule(name), "head_dim", None) if name else default
        for quantizer in (found.keys, found.values):
            if quantizer is not None and isinstance(width, int):
                with within(name or "kv"):
                    check_width(quantizer, width)


def _named(model: nn.Module, kv: KVRecord) -> dict[str, KVFormat]:
    """Each attention that caches its own keys and values -> in what; those that cache in float left out."""
    return dict.fromkeys(cached_attentions(model), kv) if isinstance(kv, KVFormat) else dict(kv)


def _orders(model: nn.Module, formats: KVFormat | Mapping[int, KVFormat]) -> dict[int, Orders]:
    """Of the sides that are sorted, by the number of the layer."""
    found: dict[int, Orders] = {}
    for name, layer in cached_attentions(model).items():
        kv = formats if isinstance(formats, KVFormat) else formats.get(layer)
        if kv is not None and kv.sort:
            found[layer] = {side: order_of(model.get_submodule(name), side) for side in kv.sort}
    return found


def cached_attentions(model: nn.Module) -> dict[str, int]:
    """Names of the attention modules that cache what they made themselves -> number of their layer."""
    found = {name: getattr(module, "layer_idx", None) for name, module in attentions(model) if module.is_causal}
    return {name: layer for name, layer in found.items() if isinstance(layer, int)}


def kv_of_scheme(model: nn.Module, scheme: Scheme, rules: Mapping[str, Rule]) -> KVRecord | None:
    """What a model will cache in: one format, or by the names of its attentions where rules differ.

    Args:
        model: its weights may be on the meta device.
        scheme: what it is quantized to.
        rules: the rule of each module that one matched, by name.

    Raises:
        SchemeError: a rule that reaches no attention with a cache. Others: as :func:`check_cache`.
    """
    own = {name: rule.kv for name, rule in rules.items() if rule.kv is not None}
    if own:
        layers = cached_attentions(model)
        if not own.keys() & layers.keys():
            raise SchemeError(f"{next(iter(own))} keeps no KV cache, and the rule that gives it one reaches no other.")
        formats = {name: own.get(name, scheme.kv) for name in layers}
        kv: KVRecord | None = {n: found for n, found in formats.items() if found is not None and found.stores}
    else:
        kv = scheme.kv if scheme.kv is not None and scheme.kv.stores else None
    if kv:
        check_cache(model, kv)
    return kv or None


def attention_formats(model: Any, kv: KVRecord) -> dict[str, KVFormat]:
    """Each attention whose keys and values are cached -> in what; cross-attentions too.

    Raises:
        ModelError: a layer's cache is filled by something else. SchemeError: scales that are calibrated, of a
            cross-attention.
    """
    own = cached_attentions(model)
    named = _named(model, kv)
    layers = layer_formats(model, kv)
    wanted = set(layers) if isinstance(layers, dict) else _cached_layers(model, layers)
    lacking = wanted - {own[name] for name in named}
    if lacking:
        raise ModelError(
            f"what layer {min(lacking)} of {type(model).__name__} caches doesn't come from an attention that calls "
            "transformers' interface, so it can't be trained; leave kv out."
        )
    if not model.config.is_encoder_decoder:
        return named
    by_layer = {own[name]: found for name, found in named.items()}
    inside = set(model.get_decoder().modules())
    for name, module in attentions(model):
        layer = getattr(module, "layer_idx", None)
        if name not in own and module in inside and layer in by_layer:
            found = by_layer[layer]
            if found.static:
                raise SchemeError(f"{name}: a cross-attention's cache has no scale of its own; leave 'static' out.")
            named[name] = found.of_given()  # the encoder's tokens are there at once
    return named


def _cached_layers(model: Any, kv: KVFormat) -> set[int]:
    """Numbers of the layers whose cache has keys and values."""
    from nybble.nn.kv_cache import QuantizedCache, QuantizedLayer

    layers = QuantizedCache.of(model.config, kv).layers
    return {number for number, layer in enumerate(layers) if isinstance(layer, QuantizedLayer)}


def layer_formats(model: nn.Module, kv: KVRecord) -> KVFormat | dict[int, KVFormat]:
    """What is recorded, by the number of the layer; cross-attention caches as its layer's own attention does.

    Raises:
        ModelError: a name that is no attention with a cache.
    """
    if isinstance(kv, KVFormat):
        return kv
    layers = cached_attentions(model)
    unknown = [name for name in kv if name not in layers]
    if unknown:
        raise ModelError(f"{unknown[0]} keeps no KV cache in this model.")
    return {layers[name]: found for name, found in kv.items()}


def to_calibrate(model: nn.Module, kv: KVRecord | None) -> dict[str, KVFormat]:
    """Attention -> its format, of those whose scales are still to be found on calibration data."""
    if kv is None:
        return {}
    named = _named(model, kv)
    return {name: found for name, found in named.items() if found.static}


def cache_scales(model: nn.Module, kv: KVRecord | None) -> dict[str, tuple[float, float]] | None:
    """Attention -> the one scale of its keys and of its values, 1 where there is none; None where tokens measure any.

    Layers that cache in float are left out.
    """
    if kv is None:
        return None
    named = _named(model, kv)
    found = {name: (one_scale(each.keys), one_scale(each.values)) for name, each in named.items()}
    return {n: (k, v) for n, (k, v) in found.items() if k is not None and v is not None} if _whole(found) else None


def _whole(found: Mapping[str, tuple[float | None, float | None]]) -> bool:
    return all(scale is not None for pair in found.values() for scale in pair)


def to_json(kv: KVRecord) -> str | dict[str, str]:
    """As config.json holds it."""
    return str(kv) if isinstance(kv, KVFormat) else {name: str(found) for name, found in kv.items()}


def from_json(data: Any) -> KVRecord | None:
    """Inverse of :func:`to_json`, of a file that may say anything; None of None.

    Raises:
        FileError: it is no line, nor a mapping to lines.
    """
    if data is None:
        return None
    try:
        if isinstance(data, str):
            return KVFormat.parse(data)
        if isinstance(data, dict) and data and all(isinstance(line, str) for line in data.values()):
            return {str(name): KVFormat.parse(line) for name, line in data.items()}
    except NybbleError as error:
        raise FileError(f"the KV cache of this checkpoint: {error}") from error
    raise FileError(f"the KV cache of this checkpoint is no quantizer line: {data!r:.80}.")


def cache_argument(kind: type[nn.Module]) -> str:
    """What the forward of a class of modules calls the cache that it is given; empty if it takes none."""
    return next((name for name in _NAMES if name in _takes(kind)), "")


def no_cache(model: nn.Module) -> dict[str, bool]:
    """What tells a model, whatever it is called with, to cache nothing; empty of one that can't be told.

    A model that is told by keywords of any name hands them on to one inside that has a name for it.
    """
    takes = inspect.signature(model.forward).parameters
    free = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in takes.values())
    parts = {type(part) for part in model.modules()} if free else ()
    told = "use_cache" in takes or any("use_cache" in _takes(kind) for kind in parts)
    return {"use_cache": False} if told else {}


def _given(arguments: Mapping[str, Any]) -> list[str]:
    """Names under which a cache is given."""
    return [name for name in _NAMES if arguments.get(name) is not None]


def _takes(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a class of modules takes."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _prepare_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate``'s own step, and then the cache that it made becomes a quantized one."""
    own = getattr(type(self), _PREPARE)
    hook = _hook(self)
    given = inspect.signature(own).bind(self, *args, **kwargs).arguments
    options, config = given["model_kwargs"], given["generation_config"]
    if hook is None or _given(options):
        return own(self, *args, **kwargs)
    if config.cache_implementation not in (None, "dynamic"):
        raise UsageError(
            f"cache_implementation={config.cache_implementation!r}: this model caches in few bits, in a dynamic cache; "
            f"leave it out, or pass a cache of your own ({cache_argument(type(self))})."
        )
    result = own(self, *args, **kwargs)
    for name in _given(options):
        options[name] = hook.make(self)
        if config.is_assistant:
            options[name].activate_past_recording()
    return result
