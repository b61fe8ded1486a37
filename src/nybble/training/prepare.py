"""prepare: the layers that a scheme names become their trainable twins; any training loop may follow.

prepare(model, "W4A8_E2M1_E4M3", {"weights": "lsq"})
...                                                     # the trainer of your choice
convert(model)                                          # packed; nybble.checkpoint.save.save(model, folder)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError, UsageError, did_you_mean, within
from nybble.core.explicit import explicit_settings
from nybble.hard import check_finite
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned, Part, make_part
from nybble.models.adapter import adapter_for
from nybble.nn.config import config_of
from nybble.nn.fake import FakeLayer
from nybble.nn.in_place import evaluation_mode, whole_or_not_at_all
from nybble.nn.kinds import LayerKind, Target, apart_line, kind_of, live, look_alikes, targets_of
from nybble.nn.read_weights import read_weights
from nybble.nn.swap import set_module
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe
from nybble.scheme import Scheme, parse_scheme, split_apart

ROLES = (WEIGHTS, "inputs", "outputs")


@dataclass(frozen=True)
class _Layer:
    """A layer to replace: what it is, its rule, and the parts that learn."""

    target: Target
    module: nn.Module
    parts: Mapping[str, Part]

    @property
    def matrix(self) -> Tensor:
        return self.target.kind.matrix(self.module, "", live(self.module)).detach()

    def quantizer(self, role: str) -> Quantizer | None:
        found: Quantizer | None = getattr(self.target.rule, role)
        return found

    def example(self, role: str) -> Tensor:
        """Zeros of a shape that a granularity can judge by."""
        return torch.zeros(1, 8, self.target.shape[1 if role == "inputs" else 0])


@explicit_settings()
def prepare(
    model: nn.Module,
    scheme: Scheme | Recipe | str | Mapping[str, Any],
    learned: Mapping[str, str | Part] | None = None,
    *,
    run: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Put a :class:`~nybble.nn.fake.FakeLayer` where each layer that the scheme names stands.

    The model computes from then on what the quantized one will; its other parameters train as before. Parts with a
    penalty (AdaRound) want :func:`nybble.nn.fake.penalty_of` in the loss. To go on after an interruption, prepare the
    same float model the same way and load the state dict.

    Args:
        model: float, in memory; changed in place, but for a model that is a single layer: use what is returned.
        scheme: what to quantize to; of a recipe its scheme (its steps are for quantization after training).
        learned: part (a name, or one with options) for ``weights``, ``inputs`` and ``outputs``; those left out pass
            gradients straight through (``ste``).
        run: calls the model on a batch or more, without changing it; needed where activations are static: their first
            scale comes from what first enters (or leaves) the layer.

    Returns:
        the model.

    Raises:
        SchemeError: a pattern without a match; an embedding, experts, attention products or a tied weight among the
            targets; a format or granularity that a part can't learn. UsageError: static activations and no ``run``.
        ModelError: ``run`` never called a layer. DataError: NaN or Inf in a weight or its activations.

    Warns:
        UserWarning: names modules that the scheme takes and that no layer can stand for; they stay as they are.
    """
    if isinstance(kind_of(model), LayerKind):
        (alone,) = prepare(nn.Sequential(model), scheme, learned, run=run).children()
        return alone
    chosen = scheme.scheme if isinstance(scheme, Recipe) else scheme
    chosen = chosen if isinstance(chosen, Scheme) else parse_scheme(chosen)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    chosen = chosen if first is None else chosen.of_model(first.dtype)
    layers = _layers(model, chosen, _parts(learned or {}))
    for name, layer in layers.items():
        with within(name):
            _check(layer)
    static = _watch(model, layers, run)
    with whole_or_not_at_all(model):
        for name, layer in layers.items():
            with within(name):
                fake = _twin(layer, {role: made for (at, role), made in static.items() if at == name})
            set_module(model, name, fake.train(model.training))
    return model


def learning_groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters of a prepared model for a torch optimizer, each group of the learned ones with its own rate.

    Args:
        model: from :func:`prepare`.
        rates: learning rates by group: ``scales``, or ``inputs.scales`` of one role only (which wins); groups that are
            not named, and everything else, get the optimizer's. No learned group has weight decay: it would pull
            scales and rounding towards zero.

    Raises:
        UsageError: a rate for a group that no layer has.
    """
    named: dict[str, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, FakeLayer):
            for name, parameters in module.groups().items():
                if trainable := [p for p in parameters if p.requires_grad]:
                    named.setdefault(name, []).extend(trainable)
    known = {*named, *(name.rpartition(".")[2] for name in named)}
    for name in rates:
        if name not in known:
            raise UsageError(f"no layer learns {name!r}.{did_you_mean(name, known)}")
    own = {name: key for name in named for key in (name, name.rpartition(".")[2]) if key in rates}
    own |= {name: name for name in named if name in rates}
    taken = {id(p) for name in named if name in own or "." in name for p in named[name]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
    for name, parameters in named.items():
        if id(parameters[0]) in taken:
            rate = {"lr": rates[own[name]]} if name in own else {}
            groups.append({"params": parameters, **rate, **({"weight_decay": 0.0} if "." in name else {})})
    return groups


def _parts(learned: Mapping[str, str | Part]) -> dict[str, Part]:
    for role in learned:
        if role not in ROLES:
            raise UsageError(f"parts learn {', '.join(ROLES)}; got {role!r}.{did_you_mean(role, ROLES)}")
    asked = {role: learned.get(role, "ste") for role in ROLES}
    return {role: part if isinstance(part, Part) else make_part(part, {}) for role, part in asked.items()}


def _layers(model: nn.Module, scheme: Scheme, parts: Mapping[str, Part]) -> dict[str, _Layer]:
    """What the scheme names, by name.

    Raises:
        SchemeError: something of it has no trainable twin.
    """
    known = targets_of(model)
    modules = {name: model.get_submodule(target.module) for name, target in known.items()}
    convolutional = _convolutional(model)
    classes = {name: t.kind.class_names(modules[name], convolutional) for name, t in known.items()}
    alike = look_alikes(model, convolutional)
    classes |= alike
    if "lm_head" in scheme.ignore:  # it means the output head, whatever its name
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {name for name, module in model.named_modules() if module is head and name != "lm_head"}
        classes = {n: c for n, c in classes.items() if n not in heads}
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found: dict[str, _Layer] = {}
    read = read_weights(model)
    matched, apart = split_apart(scheme.match(classes), alike)
    if apart:
        warnings.warn(apart_line(apart), stacklevel=3)
    for name, rule in matched.rules.items():
        target = replace(known[name], rule=rule)
        with within(name):
            if not isinstance(target.kind, LayerKind):
                raise SchemeError(
                    f"its kind is '{target.kind}', whose quantization can't be trained yet; that of layers with one "
                    f"matrix can. Ignore it ({', '.join(classes[name])}), or narrow the rule's targets."
                )
            if name in read:
                raise SchemeError("the model's code reads its weight instead of calling it. Ignore it.")
            target.kind.check(target, modules[name])
            own = target.parameters
            shared = [other for key in own for other in uses[id(model.get_parameter(key))] if other not in own]
            if shared:
                raise SchemeError(
                    f"it shares its weight with {', '.join(shared)}; training would part them. Ignore it."
                )
        found[name] = _Layer(target, modules[name], parts)
    return found


def _convolutional(model: nn.Module) -> bool:
    """Whether ``Linear`` among targets means convolutions too, as it does when such a network is quantized."""
    if config_of(model) is None:
        return True
    try:
        return adapter_for(model).convolutional
    except ModelError:
        return False


def _check(layer: _Layer) -> None:
    check_finite(layer.matrix, "the weight")
    for role in ROLES:
        quantizer = layer.quantizer(role)
        if quantizer is not None:
            layer.parts[role].check(quantizer, WEIGHTS if role == WEIGHTS else ACTIVATIONS)
            shape = layer.target.shape if role == WEIGHTS else layer.example(role).shape
            quantizer.granularity.check(shape)


def _watch(
    model: nn.Module, layers: Mapping[str, _Layer], run: Callable[[nn.Module], object] | None
) -> dict[tuple[str, str], Learned]:
    """The Learned of static activations, by name and role: made of what first enters or leaves, which is not kept."""
    wanted = [(n, r) for n, layer in layers.items() for r in ROLES[1:] if (q := layer.quantizer(r)) and q.static]
    if not wanted:
        return {}
    if run is None:
        raise UsageError(
            f"{wanted[0][0]}: static {wanted[0][1]} begin with a scale that a batch decides; give "
            "run=lambda model: model(**batch), or leave 'static' out."
        )
    found: dict[tuple[str, str], Learned] = {}

    def look(name: str, role: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, output: Any = None) -> None:
            if (name, role) not in found:
                with within(name):
                    found[name, role] = _make(layers[name], role, given[0] if role == "inputs" else output)

        return hook

    handles = []
    for name, role in wanted:
        module = layers[name].module
        register: Any = module.register_forward_pre_hook if role == "inputs" else module.register_forward_hook
        handles.append(register(look(name, role)))
    try:
        with evaluation_mode(model), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    for key in wanted:
        if key not in found:
            raise ModelError(f"run never called {key[0]}, so nothing says where its {key[1]} begin; ignore it.")
    return found


def _make(layer: _Layer, role: str, x: Tensor) -> Learned:
    """The Learned of a role, from the weight or an example of the activations."""
    quantizer = layer.quantizer(role)
    assert quantizer is not None
    if role != WEIGHTS:
        check_finite(x, f"what it has as {role}")
    return layer.parts[role].make(quantizer, x, side=WEIGHTS if role == WEIGHTS else ACTIVATIONS)


def _twin(layer: _Layer, static: Mapping[str, Learned]) -> FakeLayer:
    """What stands for the layer."""
    made: dict[str, Learned | None] = dict.fromkeys(ROLES)
    for role in ROLES:
        if role in static:
            made[role] = static[role]
        elif layer.quantizer(role) is not None:
            x = layer.matrix if role == WEIGHTS else layer.example(role).to(layer.matrix.device)
            made[role] = _make(layer, role, x)
    fake = FakeLayer(layer.module, None, made[WEIGHTS], made["inputs"], made["outputs"])
    if made[WEIGHTS] is not None and layer.parts[WEIGHTS].fixes_x:
        fake.weight.latent.requires_grad_(False)
    return fake
