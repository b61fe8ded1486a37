"""A menu of formats: quantizer lines, or short names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nybble.core.errors import UsageError
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
    lines = _split(menu) if isinstance(menu, str) else [line.strip() for line in menu]
    found: dict[str, Quantizer] = {}
    for line in lines:
        if not line:
            raise UsageError(f"the menu {menu!r} has an empty item; give formats with a comma between them: int4,int8.")
        made = Quantizer(f"{line} group={GROUP} pad=true" if re.fullmatch(r"int\d+", line) else line)
        if same := next((name for name, other in found.items() if other == made), None):
            raise UsageError(f"the menu has {line!r} twice{'' if same == line else f' (as {same!r})'}; leave one out.")
        found[line] = made
    if not found:
        raise UsageError("the menu is empty; give formats with a comma between them: int2,int3,int4,int8.")
    return found


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
