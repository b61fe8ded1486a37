"""``builtin``: CPython's own language reference topics, the text that is there when nothing else is.

``pydoc_data.topics`` holds the texts behind ``help('TOPIC')``: English about Python, licence PSF. Some topics are
chapters that contain others (``compound`` holds ``if``, ``with``, ``try``), so a plain split would judge on text
seen in calibration. The rule here, the same on every Python:

1. From long to short, a topic most of whose text stands in topics already kept is dropped.
2. Topics that share a paragraph of at least 60 characters form a group; a group is never cut.
3. From the largest group to the smallest, each goes to the part with fewer characters, calibration first.

The topics differ between Python versions, so the sha256 belongs in every manifest beside the numbers.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nybble.data.text import Part, TextSource, make_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARED_PARAGRAPH = 60  # characters; shorter ones ("See also:", a heading) repeat without telling anything


class Builtin:
    """The topics of this Python, split once into two parts that share no paragraph."""

    fallback = False

    def accepts(self, src: str) -> bool:
        """True for the word ``builtin``."""
        return src == "builtin"

    def read(self, src: str, part: Part, tokenizer: PreTrainedTokenizerBase | None) -> TextSource:
        """Return the topics of one part, in order of their names."""
        from pydoc_data.topics import topics  # half a megabyte of literals: only when asked for

        names = split_topics(topics)[part]
        note = f"pydoc_data.topics of Python {platform.python_version()}, {part} part: {len(names)} topics"
        return make_source((topics[name] for name in names), name=src, note=note)


PART = Builtin()


def split_topics(topics: Mapping[str, str]) -> dict[Part, list[str]]:
    """Split topics by the rule of this module; names are sorted within a part."""
    groups = _groups({name: _paragraphs(text) for name, text in topics.items()})
    parts: dict[Part, list[str]] = {"calibration": [], "evaluation": []}
    sizes: dict[Part, int] = {"calibration": 0, "evaluation": 0}
    by_size = {tuple(sorted(group)): sum(len(topics[name]) for name in group) for group in groups}
    for group, size in sorted(by_size.items(), key=lambda item: (-item[1], item[0])):
        part: Part = "calibration" if sizes["calibration"] <= sizes["evaluation"] else "evaluation"
        parts[part].extend(group)
        sizes[part] += size
    return {part: sorted(names) for part, names in parts.items()}


def _paragraphs(text: str) -> set[str]:
    """The paragraphs long enough to tell; white space is evened out, as indentation varies between topics."""
    evened = (" ".join(block.split()) for block in text.replace("\n \n", "\n\n").split("\n\n"))
    return {paragraph for paragraph in evened if len(paragraph) >= _SHARED_PARAGRAPH}


def _groups(paragraphs: Mapping[str, set[str]]) -> list[set[str]]:
    """Drop topics that others contain, and join those that share a paragraph."""
    seen: set[str] = set()
    groups: list[tuple[set[str], set[str]]] = []  # (names, their paragraphs), disjoint in both
    for name in sorted(paragraphs, key=lambda name: (-_size(paragraphs[name]), name)):
        own = paragraphs[name]
        if own and _size(own & seen) * 2 > _size(own):
            continue
        names, texts, apart = {name}, set(own), []
        for group in groups:
            if group[1] & own:
                names |= group[0]
                texts |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (names, texts)]
        seen |= own
    return [names for names, _ in groups]


def _size(paragraphs: set[str]) -> int:
    return sum(map(len, paragraphs))
