"""A menu of formats: quantizer lines, or short names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nybble.core.errors import UsageError
from nybble.presets import PRESETS
from nybble.quantizer import Quantizer

GROUP = 64


def parse_menu(menu: str | Sequence[str]) -> dict[str, Quantizer]:
    """Quantizers by what the user called them, in that order.

    ``int4``, an integer alone, means groups of 64 columns, the last of a row padded where they don't divide; all else
    is a line as it stands.

    Args:
        menu: lines, or one text with commas between them (those in parentheses and brackets don't count).

    Raises:
        UsageError: no format, one twice, an unknown word, or one that weights can't have.

    >>> [str(q) for q in parse_menu("int4,nvfp4-46,int3 channel").values()][::2]
    ['int4 group=64 pad=true', 'int3 channel']
    """
    return _distinct(menu, lambda line: f"{line} group={GROUP} pad=true" if re.fullmatch(r"int\d+", line) else line)


def parse_pairs(menu: str | Sequence[str]) -> dict[str, tuple[Quantizer, Quantizer]]:
    """Quantizers of weights and of what enters, by what the user called them: of searches that train both.

    ``int4`` or ``e4m3``, a number format alone, means ``channel`` for weights and one measured scale for what enters
    (FLIQS); one of 16 bits has no scales. ``WEIGHTS / INPUTS`` are two lines; another line stands for both.

    Raises:
        UsageError: as :func:`parse_menu`.

    >>> [f"{w} / {x}" for w, x in parse_pairs(["int4", "bf16", "int3 group=8 / int8 token"]).values()]
    ['int4 channel / int4', 'float16_e8m7 scale=one / float16_e8m7 scale=one', 'int3 group=8 / int8 token']
    """
    made = _distinct(menu, lambda line: _pair(line)[0], lambda line: _pair(line)[1])
    return {name: (weights, Quantizer(_pair(name)[1])) for name, weights in made.items()}


def _pair(line: str) -> tuple[str, str]:
    weights, slash, inputs = (word.strip() for word in line.partition("/"))
    if slash:
        return weights, inputs
    if " " in line or line in PRESETS:
        return line, line
    if Quantizer(line).format.bits == 16:
        return f"{line} scale=one", f"{line} scale=one"
    return f"{line} channel", line


def _distinct(menu: str | Sequence[str], *spelled: Callable[[str], str]) -> dict[str, Quantizer]:
    """Quantizers of the first spelling of each item; no two items are alike in all."""
    lines = _split(menu) if isinstance(menu, str) else [line.strip() for line in menu]
    found: dict[str, list[Quantizer]] = {}
    for line in lines:
        if not line:
            raise UsageError(f"the menu {menu!r} has an empty item; give formats with a comma between them: int4,int8.")
        made = [Quantizer(spell(line)) for spell in spelled]
        if same := next((name for name, other in found.items() if other == made), None):
            raise UsageError(f"the menu has {line!r} twice{'' if same == line else f' (as {same!r})'}; leave one out.")
        found[line] = made
    if not found:
        raise UsageError("the menu is empty; give formats with a comma between them: int2,int3,int4,int8.")
    return {name: made[0] for name, made in found.items()}


def _split(text: str) -> list[str]:
    items, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    items = [item.strip() for item in items]
    return [] if items == [""] else items
