"""An optimizer from a line: its name in :mod:`nybble.optim` or ``torch.optim``, and options."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import nybble.optim
from nybble.core.errors import NybbleError, UsageError, did_you_mean

WHY_NOT = {
    "LBFGS": "it asks for the loss several times a step, and a loop of accumulated gradients has it once",
    "SparseAdam": "it takes sparse gradients, and these are dense",
}
"""torch's own that can't train here."""


def parse_optimizer(line: str) -> tuple[type[Any], dict[str, Any]]:
    """The class and its options.

    Args:
        line: ``AdamW``, ``AdamW8bit min_size=0``, ``AdamW state='dynamic8 flat=256'``; ``torch.AdamW fused=true`` is
            torch's, and so is a name that only torch has (``NAdam``). Values are YAML's, ``none`` is None.

    Raises:
        UsageError: an unknown optimizer or option, or a malformed line.
    """
    try:
        name, *words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"optimizer {line!r}: give a name, and options as NAME=VALUE.") from error
    kind = _kind(name)
    options = read_options(words, f"optimizer {name}")
    # args is bitsandbytes' object of options, which a line can't hold
    takes = [key for key in inspect.signature(kind).parameters if key not in ("params", "lr", "args")]
    for key in options:
        if key not in takes:
            raise UsageError(f"optimizer {name} has no option {key!r} here.{did_you_mean(key, takes)}")
    if "weight_decay" in takes:
        options.setdefault("weight_decay", 0.0)  # adapters and scales aren't to shrink unless that is asked for
    return kind, options


def _kind(name: str) -> type[Any]:
    """The class of a name; ours first."""
    bare = name.removeprefix("torch.").removeprefix("optim.")
    places = (torch.optim,) if bare != name else (nybble.optim, torch.optim)
    for place in places:
        kind = None if bare.startswith("_") else getattr(place, bare, None)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            continue
        if place is torch.optim and bare in WHY_NOT:
            raise UsageError(f"optimizer {name} can't be used: {WHY_NOT[bare]}.")
        if kind is not torch.optim.Optimizer and not inspect.isabstract(kind):
            return kind
    rules = [part.__name__ for part in nybble.optim.REGISTRY.all().values()]
    raise UsageError(f"unknown optimizer {name!r}.{did_you_mean(name, [*rules, *nybble.optim.preset_names()])}")


def read_options(words: Iterable[str], where: str) -> dict[str, Any]:
    """``NAME=VALUE`` words as a mapping, values read as YAML.

    Raises:
        UsageError: a word that is not of this form.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise UsageError(f"{where}: {word!r} is not of the form NAME=VALUE.")
        try:
            found[key] = None if text.lower() == "none" else _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise UsageError(f"{where}: the value of {word!r} is not YAML.") from error
    return found


def _number(value: Any) -> Any:
    """YAML takes 1e-7 for a word, for want of a dot."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def make_optimizer(
    line: str, model: nn.Module, lr: float, groups: Sequence[Mapping[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that want gradients, by name.

    Args:
        line: as :func:`parse_optimizer`.
        model: what trains.
        lr: learning rate.
        groups: as torch's optimizers take them, of tensors, each perhaps with a rate of its own; None: one of all.

    Raises:
        UsageError: as :func:`parse_optimizer`; what the optimizer itself refuses.
    """
    kind, options = parse_optimizer(line)
    wanted: list[Any] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if groups is not None:
        names = {id(p): name for name, p in wanted}
        wanted = [{**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in groups]
    try:
        made: torch.optim.Optimizer = kind(wanted, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own words about its options
        if isinstance(error, NybbleError):
            raise
        raise UsageError(f"optimizer {line!r}: {' '.join(str(error).split())}") from error
    return made


def trainer_optimizer(line: str, args: Any) -> tuple[type[Any], dict[str, Any]]:
    """For transformers' Trainer, which knows optimizers of others by class alone, and not by ``optim=``.

    ::

        args = TrainingArguments(out, learning_rate=1e-4, weight_decay=0.01)
        Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer("AdamW8bit", args))

    Args:
        line: as :func:`parse_optimizer`; its options come before those of ``args``.
        args: TrainingArguments, of which ``learning_rate`` is taken, and ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` by the rules that have Adam's. ``weight_decay`` is the Trainer's own to give, but to norms
            and biases.

    Returns:
        the class and its arguments.

    Raises:
        UsageError: as :func:`parse_optimizer`.
    """
    kind, options = parse_optimizer(line)
    takes = inspect.signature(kind).parameters
    adams = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    usual = {"betas": (0.9, 0.999), "eps": 1e-8}
    if any(key not in takes or takes[key].default != default for key, default in usual.items()):
        adams = {}
    return kind, {"lr": args.learning_rate, **adams, **options}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all that an optimizer keeps between steps."""
    asked = getattr(optimizer, "state_bytes", None)
    if asked is not None:
        kept: Mapping[str, int] = asked()
        return sum(kept.values())
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
