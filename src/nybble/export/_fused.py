"""Layers that runtimes join into one: they read one input, so they share a scheme and the scale of their scales.

Source: vLLM's ``packed_modules_mapping`` of its models, llm-compressor's guide to observers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nybble.core.errors import SchemeError
from nybble.scheme import Rule

SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
)
"""Last parts of the names of layers that stand side by side."""


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers among ``names`` that a runtime joins; each group has at least two.

    >>> fused_groups(["a.q_proj", "a.k_proj", "a.o_proj", "b.q_proj"])
    [('a.q_proj', 'a.k_proj')]
    """
    known = list(names)
    there = set(known)
    found: dict[tuple[str, ...], None] = {}
    for name in known:
        parent, _, leaf = name.rpartition(".")
        group = next((group for group in SIBLINGS if leaf in group), ())
        full = (f"{parent}.{other}" if parent else other for other in group)
        members = tuple(other for other in full if other in there)
        if len(members) > 1:
            found.setdefault(members)
    return list(found)


def check_siblings(rules: Mapping[str, Rule], names: Iterable[str]) -> None:
    """Raise SchemeError where layers that are joined have different rules, or only some of them have one.

    Args:
        rules: layer -> its rule.
        names: of all layers.
    """
    for group in fused_groups(names):
        first, *others = (_sides(rules.get(name)) for name in group)
        if any(other != first for other in others):
            raise SchemeError(
                f"{', '.join(group)}: runtimes join these layers into one, and the scheme treats them differently; "
                "give all of them one rule, or ignore all."
            )


def _sides(rule: Rule | None) -> tuple[object, ...]:
    return () if rule is None else (rule.weights, rule.inputs, rule.outputs)
