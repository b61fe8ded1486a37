"""Which layers have to have one format: those that read one input (q, k and v), and the experts of a block.

Runtimes multiply them at once, or read them by one description.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.core.errors import UsageError, did_you_mean
from nybble.nn.kinds import Target

_NUMBERED = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a forward shows of layers.

    Attributes:
        macs: name -> multiply-accumulates. readers: names of layers that read one tensor, in the order of their calls.
    """

    macs: Mapping[str, int]
    readers: Sequence[Sequence[str]]


@torch.no_grad()
def see(model: nn.Module, targets: Sequence[Target], call: Callable[[], Any]) -> Seen:
    """Run a model once and watch some of its layers.

    Args:
        model: with real weights.
        targets: the layers, by full names.
        call: runs it on one sample.
    """
    macs = {target.name: 0 for target in targets}
    readers: dict[Any, list[str]] = {}
    alive: list[Tensor] = []  # an input freed during the run could lend its address to another
    handles = []
    for target in targets:

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target = target) -> None:
            kind, x = target.kind, target.kind.reads(args, kwargs)
            alive.append(x)
            key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version, kind.cut(module))
            if target.name not in (names := readers.setdefault(key, [])):
                names.append(target.name)
            if kind.fused:
                rows = sum(len(own) for _, own in kind.routed(module, target.leaf, args, kwargs))
                macs[target.name] += rows * target.shape[0] * target.shape[1]

        def count(module: nn.Module, args: tuple[Any, ...], output: Any, target: Target = target) -> None:
            if not target.kind.fused:
                rows = target.kind.products(module, output) // target.groups
                macs[target.name] += rows * target.shape[0] * target.shape[1]

        module = model.get_submodule(target.module)
        handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
        handles.append(module.register_forward_hook(count))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return Seen(macs=macs, readers=[*readers.values()])


def found_groups(names: Sequence[str], readers: Iterable[Sequence[str]]) -> list[list[int]]:
    """Numbers of the layers of each group, in the order of ``names``.

    Args:
        names: of the layers.
        readers: of :func:`see`.
    """
    root = {name: name for name in names}

    def of(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    experts: dict[str, list[str]] = {}
    for name in names:
        if _NUMBERED.search(name):  # one module an expert; in some a layer sees no token
            experts.setdefault(_NUMBERED.split(name)[0], []).append(name)
    for together in (*readers, *experts.values()):
        for name in together[1:]:
            root[of(name)] = of(together[0])
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(of(name), []).append(number)
    return [*groups.values()]


def given_groups(names: Sequence[str], asked: Sequence[Sequence[str]]) -> list[list[int]]:
    """Groups that the caller named.

    Raises:
        UsageError: a layer that there isn't, that is in two groups, or in none; an empty group.
    """
    number = {name: i for i, name in enumerate(names)}
    of: dict[str, int] = {}
    for group, members in enumerate(asked):
        if not members:
            raise UsageError(f"group {group + 1} has no layer; leave it out.")
        for name in members:
            if name not in number:
                raise UsageError(f"groups name {name!r}, which isn't searched.{did_you_mean(name, names)}")
            if name in of:
                raise UsageError(f"{name} is in the groups {of[name] + 1} and {group + 1}; a layer has one format.")
            of[name] = group
    if left := [name for name in names if name not in of]:
        raise UsageError(
            f"{left[0]} is in no group; add it to one, or as one of its own ({len(left)} layers are left)."
        )
    return [[number[name] for name in members] for members in asked]
