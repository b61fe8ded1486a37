"""prepare: the layers that a scheme names become their trainable twins; any training loop may follow.

prepare(model, "W4A8_E2M1_E4M3", {"weights": "lsq"})
...                                                     # the trainer of your choice
convert(model)                                          # packed; nybble.checkpoint.save.save(model, folder)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import ModelError, SchemeError, UsageError, did_you_mean, within
from nybble.core.explicit import explicit_settings
from nybble.core.options import named
from nybble.hard import check_finite
from nybble.kv_format import KVFormat
from nybble.learned import ACTIVATIONS, WEIGHTS, Learned, Part, make_part
from nybble.models.adapter import adapter_for
from nybble.nn.config import config_of
from nybble.nn.in_place import evaluation_mode, untouched, whole_or_not_at_all
from nybble.nn.kinds import Site, Target, apart_line, kind_of, look_alikes, targets_of
from nybble.nn.kinds.tied import check_shared
from nybble.nn.kv_model import attention_formats, kv_of_scheme
from nybble.nn.read_weights import read_weights
from nybble.nn.twin import Twin
from nybble.recipe import Recipe
from nybble.scheme import Rule, Scheme, parse_scheme, split_apart

ROLES = (WEIGHTS, "inputs", "outputs", "matmuls", "kv")
Sites = list[tuple[Target, Site]]


@explicit_settings()
def prepare(
    model: nn.Module,
    scheme: Scheme | Recipe | str | Mapping[str, Any],
    learned: Mapping[str, str | Mapping[str, Any] | Part] | None = None,
    *,
    run: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Put a twin (:class:`~nybble.nn.twin.Twin`) where each thing that the scheme names stands.

    The model computes from then on what the quantized one will; its other parameters train as before, frozen ones
    (``requires_grad_(False)``) stay so, beside scales that may learn. Keys and values are rounded as a cache will hold
    them, in forwards with a cache and without one. An embedding and the head, or other embeddings, that are tied to it
    have one latent table. Parts with a penalty (AdaRound) want :func:`nybble.nn.fake.penalty_of` in the loss. To go on
    after an interruption, prepare the same float model the same way and load the state dict.

    Args:
        model: float, in memory; changed in place, but for a model that is a single layer: use what is returned.
        scheme: what to quantize to; of a recipe its scheme (its steps are for quantization after training).
        learned: part (a name, ``{name: {option: value}}``, or one that was made) for ``weights``, ``inputs``,
            ``outputs``, ``matmuls`` (the operands of attention) and ``kv``; those left out pass gradients straight
            through (``ste``). Each is of something that the scheme rounds.
        run: calls the model on a batch or more, without changing it; needed where activations are static: their first
            scale comes from what first enters (or leaves) the layer, the attention's product or the cache.

    Returns:
        the model.

    Raises:
        SchemeError: a pattern without a match; a weight that is shared with something that stays in float; a format or
            granularity that a part can't learn. UsageError: static activations and no ``run``; a part for what the
            scheme rounds nowhere. ModelError: ``run`` never called a layer; a cache that can't be trained. DataError:
            NaN or Inf in a weight or its activations.

    Warns:
        UserWarning: names modules that the scheme takes and that no layer can stand for; they stay as they are.
    """
    kind = kind_of(model)
    if kind is not None and not (kind.operands or kind.fused):
        (alone,) = prepare(nn.Sequential(model), scheme, learned, run=run).children()
        return alone
    chosen = scheme.scheme if isinstance(scheme, Recipe) else scheme
    chosen = chosen if isinstance(chosen, Scheme) else parse_scheme(chosen)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    chosen = chosen if first is None else chosen.of_model(first.dtype)
    parts = _parts(learned or {})
    check_rounded(learned or {}, [chosen])
    targets = _plan(model, chosen)
    static = [(target, site) for target in targets for site in _checked(model, target, parts) if site.quantizer.static]
    first_seen = _watch(model, static, parts, run)
    asked = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    with whole_or_not_at_all(model):
        for target in targets:
            with within(target.name):
                sites = target.kind.sites(target, model.get_submodule(target.module))  # weights anew, not held for all
                made = {s.name: first_seen.get((target.name, s.name)) or _make(s, parts, s.example) for s in sites}
                _put(model, target, made, parts, asked)
        for kind in dict.fromkeys(target.kind for target in targets):
            kind.prepare_twins(model, [target for target in targets if target.kind is kind])
    return model


def _checked(model: nn.Module, target: Target, parts: Mapping[str, Part]) -> Iterator[Site]:
    """What is rounded of a target."""
    with within(target.name):
        for site in target.kind.sites(target, model.get_submodule(target.module)):
            if site.side == WEIGHTS:
                check_finite(site.example, "the weight")
            parts[site.role].check(site.quantizer, site.side)
            site.quantizer.granularity.check(site.example.shape)
            yield site


def learning_groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters of a prepared model for a torch optimizer, each group of the learned ones with its own rate.

    Args:
        model: from :func:`prepare`.
        rates: learning rates by group: ``scales``, or ``inputs.scales`` of one role only (which wins); groups that are
            not named, and everything else, get the optimizer's. No learned group has weight decay: it would pull
            scales and rounding towards zero.

    Raises:
        UsageError: a rate for a group that no layer has; nothing asks for a gradient.
    """
    named: dict[str, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, Twin):
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
    if not groups:
        raise UsageError(
            "nothing in this model trains: all its parameters are frozen, and no part learns. Call requires_grad_(True)"
            " on what is to train, or let a part learn scales (lsq)."
        )
    return groups


def rounded_roles(scheme: Scheme) -> frozenset[str]:
    """Of weights, inputs, outputs, matmuls and kv those that some rule has a line for."""
    found = {role for role in ROLES for rule in scheme.rules if getattr(rule, role) is not None}
    return frozenset(found | ({"kv"} if scheme.kv is not None else set()))


def check_rounded(learned: Mapping[str, object], schemes: Sequence[Scheme]) -> None:
    """Refuse parts for what none of the schemes rounds: they would do nothing.

    Raises:
        UsageError: names the role, and what is rounded.
    """
    rounded = frozenset[str]().union(*map(rounded_roles, schemes))
    for role in learned:
        if role not in rounded:
            raise UsageError(
                f"learned: a part for {role}, and the scheme rounds none, but {', '.join(sorted(rounded)) or 'nothing'}"
                f"; give {role} a line in the scheme, or leave the part out."
            )


def _parts(learned: Mapping[str, str | Mapping[str, Any] | Part]) -> dict[str, Part]:
    for role in learned:
        if role not in ROLES:
            raise UsageError(f"parts learn {', '.join(ROLES)}; got {role!r}.{did_you_mean(role, ROLES)}")
    asked = {role: learned.get(role, "ste") for role in ROLES}
    return {
        role: part if isinstance(part, Part) else make_part(*named(part, "learned part", f"learned: {role}"))
        for role, part in asked.items()
    }


def _plan(model: nn.Module, scheme: Scheme) -> list[Target]:
    """What the scheme names, each with its rule; of attentions with what the model is to cache in.

    Raises:
        SchemeError: something of it can't be trained.
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
        classes = {n: c for n, c in classes.items() if n not in heads or isinstance(modules.get(n), nn.Embedding)}
    matched, apart = split_apart(scheme.match(classes), alike)
    if apart:
        warnings.warn(apart_line(apart), stacklevel=3)
    kv = kv_of_scheme(model, scheme, matched.rules)
    rules = _with_caches(matched.rules, {} if kv is None else attention_formats(model, kv))
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found: list[Target] = []
    read = read_weights(model)
    for name, rule in rules.items():
        target = replace(known[name], rule=rule)
        with within(name):
            target.kind.check(target, modules[name])
            own = target.parameters
            shared = [other for key in own for other in uses[id(model.get_parameter(key))] if other not in own]
            planned = target.kind.tied(target, model, shared) if shared else target
            if planned is None:
                continue
            if not read.isdisjoint((name, planned.head, *planned.shares)):
                raise SchemeError("the model's code reads its weight instead of calling it. Ignore it.")
        found.append(planned)
    check_shared([target for target in found if target.matrices], replace(matched, rules=_of_weights(matched.rules)))
    return found


def _with_caches(rules: Mapping[str, Rule], formats: Mapping[str, KVFormat]) -> dict[str, Rule]:
    """Each rule, with what its attention caches in; and one for each attention that only caches."""
    found = {name: replace(rule, kv=None) for name, rule in rules.items()}
    for name, kv in formats.items():
        found[name] = replace(found.get(name, Rule(targets=(name,))), kv=kv)
    return {name: rule for name, rule in found.items() if rule != Rule(targets=rule.targets)}


def _of_weights(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {name: rule for name, rule in rules.items() if not rule.of_attention}


def _convolutional(model: nn.Module) -> bool:
    """Whether ``Linear`` among targets means convolutions too, as it does when such a network is quantized."""
    if config_of(model) is None:
        return True
    try:
        return adapter_for(model).convolutional
    except ModelError:
        return False


def _watch(
    model: nn.Module, static: Sites, parts: Mapping[str, Part], run: Callable[[nn.Module], object] | None
) -> dict[tuple[str, str], Learned]:
    """The Learned of static activations, by target and site: made of what first comes by, which is not kept."""
    wanted = {(target.name, site.name): (target, site) for target, site in static}
    if not wanted:
        return {}
    if run is None:
        name, site = next(iter(wanted))
        raise UsageError(
            f"{name}: static {site} begin with a scale that a batch decides; give "
            "run=lambda model: model(**batch), or leave 'static' out."
        )
    found: dict[tuple[str, str], Learned] = {}

    def look(name: str) -> Callable[[str, Tensor], None]:
        def see(site: str, x: Tensor) -> None:
            if (name, site) in wanted and (name, site) not in found:
                with within(name):
                    found[name, site] = _make(wanted[name, site][1], parts, x)

        return see

    watched = {name: target for (name, _), (target, _) in wanted.items()}
    with untouched(model), evaluation_mode(model), torch.no_grad():
        for kind in dict.fromkeys(target.kind for target in watched.values()):
            kind.prepare(model)
        ends = [t.kind.watch_sites(model.get_submodule(t.module), look(name)) for name, t in watched.items()]
        try:
            run(model)
        finally:
            for end in ends:
                end()
    for key in wanted:
        if key not in found:
            raise ModelError(f"run never called {key[0]}, so nothing says where its {key[1]} begin; ignore it.")
    return found


def _make(site: Site, parts: Mapping[str, Part], x: Tensor) -> Learned:
    """The Learned of a site, from the weight or an example of the activations."""
    if site.side == ACTIVATIONS:
        check_finite(x, f"what it has as {site.name}")
    return parts[site.role].make(site.quantizer, x, side=site.side)


def _put(
    model: nn.Module,
    target: Target,
    learned: Mapping[str, Learned],
    parts: Mapping[str, Part],
    asked: Mapping[str, bool],
) -> None:
    """Put what trains where a target stands; what ``asked`` for no gradient, by name, asks for none in it."""
    training = model.get_submodule(target.module).training
    frozen = target.parameters and not any(asked[name] for name in target.parameters)
    for twin in target.kind.put_twin(model, target, learned):
        twin.train(training)
        for weight in twin.weights():
            if frozen or (parts[WEIGHTS].fixes_x and weight.learned is not None):
                weight.latent.requires_grad_(False)
    for name in filter(None, (target.name, target.head)):
        bias = getattr(model.get_submodule(name), "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(asked.get(f"{name}.bias", True))
