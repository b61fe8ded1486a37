"""MatmulFormat: what the operands of an attention's two products are rounded to, and the line that says it.

A quantizer line for all four, and what differs from it by name: ``int4 tensor probabilities=(uint4 tensor)``. Or each
by itself: ``query=(int8 token) key=(int8 token) probabilities=(uint8 token) value=(int8 tensor)``. What softmax gives
is never negative, so a format of its own has twice the values for it; and in one without 0 (binary) what a mask hides
would be read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.core.errors import SchemeError, did_you_mean
from nybble.line import split_words
from nybble.quantizer import Quantizer

OPERANDS = ("query", "key", "probabilities", "value")


@dataclass(frozen=True, kw_only=True)
class MatmulFormat:
    """Quantizers of the four operands: ``query @ key^T`` and ``probabilities @ value``.

    Attributes:
        query: [batch, heads, queries, head width]. key: [batch, key heads, tokens, head width].
        probabilities: [batch, heads, queries, tokens], 0 or more. value: [batch, key heads, tokens, head width].

    >>> str(MatmulFormat.parse("int8 tensor static probabilities=(uint8 tensor static)"))
    'int8 static probabilities=(uint8 static)'
    """

    query: Quantizer
    key: Quantizer
    probabilities: Quantizer
    value: Quantizer

    @staticmethod
    def of(quantizer: Quantizer) -> MatmulFormat:
        """The same one for all."""
        return MatmulFormat(query=quantizer, key=quantizer, probabilities=quantizer, value=quantizer)

    def items(self) -> Iterator[tuple[str, Quantizer]]:
        """Operands by name, in the order of :data:`OPERANDS`."""
        for name in OPERANDS:
            yield name, getattr(self, name)

    @property
    def static(self) -> bool:
        """Whether a scale is still to be found on calibration data."""
        return any(quantizer.static for _, quantizer in self.items())

    def __str__(self) -> str:
        others = [f"{name}=({quantizer})" for name, quantizer in self.items() if quantizer != self.query]
        return " ".join([str(self.query), *others])

    @staticmethod
    def parse(line: str) -> MatmulFormat:
        """Inverse of ``str``; the grammar is in this module's docstring.

        Raises:
            UsageError: an unknown word. SchemeError: an operand without a line.
        """
        words = split_words(line)
        head = words.pop("")
        name, _, first = head.partition("=")
        own = {name: first} if first else {}
        own |= {operand: words.pop(operand) for operand in OPERANDS if operand in words}
        if first:
            _check_names(line, {**own, **words})
        rest = [head, *(f"{key}={value}" if value else key for key, value in words.items())]
        found = {} if first else dict.fromkeys(OPERANDS, Quantizer(" ".join(rest)))
        return MatmulFormat(**found | {operand: Quantizer(_inner(text)) for operand, text in own.items()})


def _check_names(line: str, words: dict[str, str]) -> None:
    """Refuse a line for each operand by itself that has others, or not all."""
    wrong = next((f" {word!r}?{did_you_mean(word, OPERANDS)}" for word in words if word not in OPERANDS), "")
    lacking = next((f" {operand} has none." for operand in OPERANDS if operand not in words), "")
    if wrong or lacking:
        raise SchemeError(
            f"{line!r}: say one line for all four operands ({', '.join(OPERANDS)}) and name those that differ behind "
            f"it, or give each its own.{wrong or lacking}"
        )


def _inner(text: str) -> str:
    return text.removeprefix("(").removesuffix(")")
