"""Layers that share what a quantizer has for a whole tensor: solved as one matrix, and cut apart again.

Runtimes join the projections of queries, keys and values into one layer, which has one outer scale (NVFP4) or one scale
(a tensor's). Rows of a matrix that read one input are solved alike whatever stands below them, so the joined matrix is
solved by any method as its parts would be, but for that scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nybble.calibration.error import relative_error
from nybble.calibration.watch import Group
from nybble.core.errors import GranularityError, SchemeError
from nybble.qtensor._rows import split_rows
from nybble.scheme import shares_over_rows
from nybble.solvers import Solved, Stats, Weight


def joined(weights: Sequence[Weight], together: Sequence[Sequence[str]]) -> list[list[Weight]]:
    """The weights of one input in groups that are solved as one; most are alone.

    Args:
        weights: that read the same input.
        together: last parts of names, as :class:`~nybble.scheme.Scheme` has them.
    """
    groups: dict[object, list[Weight]] = {}
    for weight in weights:
        parent, _, leaf = weight.name.rpartition(".")
        number = next((i for i, names in enumerate(together) if leaf in names), None)
        alone = number is None or not shares_over_rows(weight.quantizer)
        groups.setdefault(weight.name if alone else (parent, number, weight.quantizer), []).append(weight)
    return list(groups.values())


def beside_each_other(groups: Sequence[Group], together: Sequence[Sequence[str]]) -> list[Group]:
    """Where no data shows who reads one input, the layers that are to share a scale as one group; others as they are.

    Args:
        groups: of one layer each.
        together: as above.
    """
    found: dict[object, list[Group]] = {}
    for group in groups:
        parent, _, leaf = group.leader.rpartition(".")
        number = next((i for i, names in enumerate(together) if leaf in names), None)
        found.setdefault(group.leader if number is None else (parent, number, group.inputs), []).append(group)
    return [Group(members=tuple(t for g in some for t in g.members), inputs=some[0].inputs) for some in found.values()]


def solve_joined(
    solve: Callable[[Sequence[Weight], Stats], list[Solved]], weights: Sequence[Weight], stats: Stats
) -> list[Solved]:
    """What a solver makes of several weights as of one, cut apart; errors are each weight's own.

    Args:
        solve: the solver's answers.
        weights: of one group of :func:`joined`, at least two.
        stats: what calibration saw of their input.

    Raises:
        SchemeError: the answer can't be cut: its scales belong to rows of several weights.
    """
    names = [weight.name for weight in weights]
    whole = Weight(
        name="+".join(names), matrix=torch.cat([weight.matrix for weight in weights]), quantizer=weights[0].quantizer
    )
    if all(name in stats.fisher for name in names):
        stats = replace(stats, fisher={whole.name: torch.cat([stats.fisher[name] for name in names], 1)})
    (found,) = solve([whole], stats)
    sizes = [len(weight.matrix) for weight in weights]
    try:
        parts = split_rows(found.weight, sizes)
        plain = split_rows(whole.quantizer.quantize(whole.matrix), sizes)
    except GranularityError as error:
        raise SchemeError(f"{', '.join(names)} are to share a scale, and can't be solved as one: {error}") from error
    clips = [None] * len(sizes) if found.clip is None else list(torch.split(found.clip, sizes))
    second = stats.second_moment
    return [
        replace(
            found,
            weight=part,
            error=relative_error(weight.matrix, part.dequantize(), second),
            rtn_error=relative_error(weight.matrix, rtn.dequantize(), second),
            clip=clip,
        )
        for weight, part, rtn, clip in zip(weights, parts, plain, clips, strict=True)
    ]
