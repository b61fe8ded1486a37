"""Which quantizer is where, in lines: what the scheme asked for, and what each kind of layer has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from nybble.presets import PRESETS
from nybble.quantizer import Quantizer
from nybble.report.names import format_of

SIDES = {
    "weights": "Weights",
    "inputs": "Inputs",
    "outputs": "Outputs",
    "matmuls": "Attention's products",
    "kv": "KV cache",
}
MOST = 12
"""Lines of a scheme at the top of the page; the manifest has all."""


def scheme_lines(recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the scheme of a manifest's recipe asks for: (what of, quantizer line, the preset's name and the targets)."""
    scheme = recipe.get("scheme")
    scheme = scheme if isinstance(scheme, dict) else {}
    rules = [rule for rule in _list(scheme.get("rules")) if isinstance(rule, dict)]
    found = []
    for rule in rules:
        targets = f"of {', '.join(map(str, _list(rule.get('targets'))))}" if len(rules) > 1 else ""
        for side in SIDES:
            line = rule.get(side)
            if isinstance(line, str):
                found.append((SIDES[side], line, " ".join(filter(None, (_preset_names().get(line), targets)))))
    return found + ([(SIDES["kv"], scheme["kv"], "")] if isinstance(scheme.get("kv"), str) else [])


@cache
def _preset_names() -> dict[str, str]:
    """Whole lines -> the (first) preset that is one."""
    return {str(Quantizer(name)): name for name in reversed(PRESETS)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def quantizer_table(
    facts: Sequence[Mapping[str, Any]], side: str
) -> tuple[list[str], list[tuple[str, list[int], int]]]:
    """How many layers of each kind have which quantizer.

    Args:
        facts: of the layers.
        side: ``weights`` or ``inputs``.

    Returns:
        The lines, the most frequent first; and (kind, counts, their sum) by first appearance.
    """
    lines = [line for line, _ in Counter(row[side] or "float" for row in facts).most_common()]
    kinds = list(dict.fromkeys(row["kind"] for row in facts))
    counts = Counter((row["kind"], row[side] or "float") for row in facts)
    table = [(kind, [counts[kind, line] for line in lines]) for kind in kinds]
    return lines, [(kind, found, sum(found)) for kind, found in table]


def formats_were_chosen(facts: Sequence[Mapping[str, Any]], asked: Sequence[tuple[str, str, str]]) -> bool:
    """Whether layers have formats that the scheme doesn't name: then the recipe chose them."""
    known = {format_of(line) for _, line, _ in asked} | {"float"}
    return bool(asked) and any(format_of(row[side]) not in known for row in facts for side in ("weights", "inputs"))
