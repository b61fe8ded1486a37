"""KVFormat: what a KV cache stores, and the line that says it.

A quantizer line, or keys and values apart: ``keys=(bfp12) values=(int8 token) residual=32``; ``none`` is float. Behind
it ``residual=N`` and ``sink=N`` (the newest, and the first, N tokens stay in float), and ``rotate`` or ``sort``
(channels of a head are rotated, or put in the order of their size, before anything is rounded; ``rotate=keys`` of one
side alone).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from nybble.core.errors import SchemeError, did_you_mean
from nybble.granularity.block import PerBlock
from nybble.line import split_words
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding

_SIDES = ("keys", "values")
_COUNTS = {"residual": "newest", "sink": "first"}
_BASES = ("rotate", "sort")


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """What the KV cache of a layer stores.

    A cache only grows: a token's codes and scales must be final when it comes, or the same text cached in one piece, in
    chunks or token by token would be stored in different bytes. So scales belong to one token of one head (``token``)
    or to a part of it (``group=N``), and are measured when it is stored. The one scale over a tensor's scales that a
    nested quantizer has (NVFP4's float32) becomes one of the token; the line says so.

    Attributes:
        keys: quantizer of the keys [batch, heads, tokens, head width], as they are cached (behind the rotary embedding,
            where there is one); None leaves them in float. values: of the values.
        residual: newest tokens that stay in float; each is rounded once, when it leaves them.
        sink: first tokens of the text (padding counts) that stay in float, and are stored beside the others.
        rotate: sides that are rounded behind a Hadamard matrix over the channels of a head, which reading undoes.
        sort: sides whose channels stand in each head in the order of their rows' norms in the projection
            (:mod:`nybble.nn.kv_basis`), so that channels of a size share scales.

    Raises:
        SchemeError: a quantizer whose scales later tokens would change, calibrated beside a rotation, or drawn by
            chance; a side that is in float and sorted or rotated, or both.

    >>> str(KVFormat(keys=Quantizer("nvfp4"), values=Quantizer("nvfp4"), residual=16))
    'float4_e2m1fn group=16 scale_format=(float8_e4m3fn token floor=normal) residual=16'
    """

    keys: Quantizer | None
    values: Quantizer | None
    residual: int = 0
    sink: int = 0
    rotate: tuple[str, ...] = ()
    sort: tuple[str, ...] = ()
    lines: tuple[str, str] = field(init=False, repr=False, compare=False)
    """Of keys and values, as operators take them; empty for float."""

    def __post_init__(self) -> None:
        for word in _COUNTS:
            _check_count(word, getattr(self, word))
        for side in _SIDES:
            quantizer = getattr(self, side)
            if quantizer is not None:
                object.__setattr__(self, side, _of_tokens(quantizer))
        for word in _BASES:
            self._check_sides(word, getattr(self, word))
        object.__setattr__(self, "lines", tuple(str(getattr(self, side) or "") for side in _SIDES))

    def _check_sides(self, word: str, sides: tuple[str, ...]) -> None:
        for side in sides:
            quantizer = getattr(self, side) if side in _SIDES else None
            if quantizer is None:
                raise SchemeError(f"{word}={side}: say keys or values, of what is stored in few bits.")
            if quantizer.static and word == "rotate":
                raise SchemeError(
                    f"{quantizer}: rotated {side} have other magnitudes than calibration sees; leave one out."
                )
            if side in self.rotate and side in self.sort:
                raise SchemeError(f"rotate spreads the channels of {side} that sort gathers; leave one out.")
        object.__setattr__(self, word, tuple(side for side in _SIDES if side in sides))

    @property
    def plain(self) -> bool:
        """Whether all tokens are rounded alike and as they come, as other programs' caches do."""
        spans = any(tokens_a_scale(quantizer) > 1 for quantizer in (self.keys, self.values) if quantizer is not None)
        return not (self.residual or self.sink or self.rotate or self.sort or spans)

    def of_given(self) -> KVFormat:
        """The same for tokens that are all there at once and never sorted: an encoder's, for cross-attention."""
        return replace(self, residual=0, sink=0, sort=())

    def rounded(self, side: str, tokens: int) -> tuple[int, int]:
        """Which of so many tokens are in few bits, of ``keys`` or ``values``: from, and up to."""
        quantizer: Quantizer | None = getattr(self, side)
        first = min(self.sink, tokens)
        span = 1 if quantizer is None else tokens_a_scale(quantizer)
        old = 0 if quantizer is None else max(0, tokens - first - self.residual)
        return first, first + old - old % span

    @property
    def stores(self) -> bool:
        """Whether anything is in few bits."""
        return self.keys is not None or self.values is not None

    @property
    def static(self) -> bool:
        """Whether a scale is still to be found on calibration data."""
        return any(quantizer is not None and quantizer.static for quantizer in (self.keys, self.values))

    def calibrated(self, keys: float | None, values: float | None) -> KVFormat:
        """The format with scales in place of ``static``; of a side that isn't static, None."""
        made = {
            side: fixed_at(quantizer.format.name, scale) if quantizer is not None and scale is not None else quantizer
            for side, quantizer, scale in (("keys", self.keys, keys), ("values", self.values, values))
        }
        return replace(self, keys=made["keys"], values=made["values"])

    def __str__(self) -> str:
        if self.keys == self.values:
            words = str(self.keys or "none")
        else:
            words = " ".join(f"{side}=({getattr(self, side) or 'none'})" for side in _SIDES)
        for word in _COUNTS:
            words += f" {word}={getattr(self, word)}" if getattr(self, word) else ""
        stored = tuple(side for side in _SIDES if getattr(self, side) is not None)
        for word in _BASES:
            sides = getattr(self, word)
            words += "" if not sides else f" {word}" if sides == stored else f" {word}={sides[0]}"
        return words

    @staticmethod
    def parse(line: str) -> KVFormat:
        """Inverse of ``str``; the grammar is in this module's docstring.

        Raises:
            UsageError: an unknown word. SchemeError: what a cache can't store.
        """
        words = split_words(line)
        residual, sink = (_count(word, words.pop(word, "0")) for word in _COUNTS)
        bases = {word: words.pop(word) for word in _BASES if word in words}
        keys, values = _sides(words, line)
        stored = tuple(side for side, found in zip(_SIDES, (keys, values), strict=True) if found is not None)
        rotate, sort = (() if w not in bases else (bases[w],) if bases[w] else stored or _SIDES for w in _BASES)
        return KVFormat(keys=keys, values=values, residual=residual, sink=sink, rotate=rotate, sort=sort)


def _sides(words: dict[str, str], line: str) -> tuple[Quantizer | None, Quantizer | None]:
    """Keys and values of the words of a line that are left."""
    head = words.pop("")
    sides = dict([head.split("=", 1)]) if head.startswith(("keys=", "values=")) else {}
    if not sides:
        both = _stored(" ".join([head, *(f"{key}={value}" if value else key for key, value in words.items())]))
        return both, both
    sides |= words
    wrong = next((f" {key!r}?{did_you_mean(key, _SIDES)}" for key in sides if key not in _SIDES), "")
    if wrong or len(sides) < 2:
        raise SchemeError(f"{line!r}: say keys=(...) and values=(...), or one line for both.{wrong}")
    keys, values = (_stored(sides[side].removeprefix("(").removesuffix(")")) for side in _SIDES)
    return keys, values


def _count(word: str, text: str) -> int:
    return int(text) if text.isdecimal() else _check_count(word, text)


def _check_count(word: str, count: object) -> int:
    if type(count) is not int or count < 0:
        raise SchemeError(f"{word}={count}: the number of {_COUNTS[word]} tokens left in float is 0 or more.")
    return count


def _stored(line: str) -> Quantizer | None:
    return None if line == "none" else Quantizer(line)


def fixed_at(format: str, scale: float) -> Quantizer:
    """What caches in a format under one scale for all tokens, which each of them stores."""
    return Quantizer(f"{format} token scale=fixed(value={scale!r}) scale_format=float32")


def fixed_scale(quantizer: Quantizer | None) -> float | None:
    """The scale of such a one; None of any other.

    >>> fixed_scale(fixed_at("float8_e4m3fn", 0.25)), fixed_scale(Quantizer("float8_e4m3fn token"))
    (0.25, None)
    """
    if quantizer is None or not str(quantizer.scale).startswith("fixed"):
        return None
    value: float = getattr(quantizer.scale, "value")  # noqa: B009
    return value if quantizer == fixed_at(quantizer.format.name, value) else None


def one_scale(quantizer: Quantizer | None) -> float | None:
    """The one number that all tokens are divided by, 1 where there is none; None where tokens have their own."""
    if quantizer is not None and str(quantizer.scale) == "one" and not isinstance(quantizer.scale_format, Quantizer):
        return 1.0
    return fixed_scale(quantizer)


def _of_tokens(quantizer: Quantizer) -> Quantizer:
    """The quantizer with scales that belong to one token each; or one to be calibrated."""
    if quantizer.static:
        if quantizer != Quantizer(f"{quantizer.format} tensor static"):
            raise SchemeError(
                f"{quantizer}: of a cache with calibrated scales there is '{quantizer.format} tensor static', the "
                "largest magnitude of a layer's keys, or values; leave out 'static' to measure scales on each token."
            )
        if not quantizer.format.signed or not quantizer.format.has_zero:
            raise SchemeError(f"{quantizer}: keys and values are signed, and some are 0; use a format that has both.")
        return quantizer
    if not quantizer.format.signed and not (quantizer.scale.needs_integer or quantizer.scale.has_offset):
        raise SchemeError(
            f"keys and values are signed and {quantizer.format} is not; add symmetric=false or use a signed format."
        )
    _check_tokens(quantizer)
    changed = {}
    for part in ("scale_format", "offset_format"):
        inner = getattr(quantizer, part)
        if isinstance(inner, Quantizer):
            shared = str(inner.granularity) == "tensor" and not _fits_tokens(inner)
            changed[part] = inner.replace(token=True) if shared else inner
            _check_tokens(changed[part])
    return quantizer.replace(**changed) if changed else quantizer


def _check_tokens(quantizer: Quantizer) -> None:
    """Refuse what depends on the tokens around."""
    if quantizer.scale.two_level:
        raise SchemeError(
            f"{quantizer}: scale={quantizer.scale} finds one scale for all tokens; write 'nvfp4', whose outer scale "
            "becomes one of the token here."
        )
    if not _fits_tokens(quantizer) and tokens_a_scale(quantizer) == 1:
        name, _, size = str(quantizer.granularity).rpartition("=")
        columns = size.rpartition("x")[2] if name in ("flat", "block") else ""
        instead = f"{quantizer.format} group={columns}" if columns else f"{quantizer.format} token"
        raise SchemeError(
            f"{quantizer}: a KV cache grows token by token, and '{quantizer.granularity}' has scales that tokens "
            f"share, which later tokens would change. Write '{instead}', or 'group=N' for several scales a token; "
            f"'{quantizer.format} block=32x1' for one a channel and 32 tokens; or '{quantizer.format} tensor static' "
            "for one scale a layer, calibrated."
        )
    if quantizer.center:
        raise SchemeError(
            f"{quantizer}: center={quantizer.center} subtracts a mean over all tokens, which later tokens would "
            "change; leave it out."
        )
    if get_rounding(quantizer.rounding).stochastic:
        raise SchemeError(
            f"{quantizer}: what chance makes of a token would depend on how the text was cut; use "
            "rounding=nearest-even."
        )


def tokens_a_scale(quantizer: Quantizer) -> int:
    """How many tokens of a cache are rounded together: the rows of a block, else 1.

    >>> [tokens_a_scale(Quantizer(line)) for line in ("int8 token", "int2 block=32x1")]
    [1, 32]
    """
    granularity = quantizer.granularity
    return granularity.rows if isinstance(granularity, PerBlock) and not quantizer.static else 1


def tokens_apart(quantizer: Quantizer) -> bool:
    """Whether what a quantizer makes of a token [..., tokens, width] is the same whatever tokens stand beside it.

    >>> [tokens_apart(Quantizer(line)) for line in ("int8 token", "mxfp4", "int8 tensor", "nvfp4")]
    [True, True, False, False]
    """
    return _apart(quantizer, (2, 3))


def rows_apart(quantizer: Quantizer) -> bool:
    """Whether what it makes of a row of a weight [rows, columns] is the same whatever rows stand beside it.

    >>> [rows_apart(Quantizer(line)) for line in ("int8 channel", "mxfp4", "int8 tensor", "nvfp4", "nf4 flat=64")]
    [True, True, False, False, False]
    """
    return _apart(quantizer, ())


def _apart(quantizer: Quantizer, leading: tuple[int, ...]) -> bool:
    nested = [q for q in (quantizer.scale_format, quantizer.offset_format) if isinstance(q, Quantizer)]
    alone = _fits_tokens(quantizer, leading) and not quantizer.scale.two_level and not quantizer.center
    return alone and all(_apart(inner, leading) for inner in nested)


def _fits_tokens(quantizer: Quantizer, leading: tuple[int, ...] = (2, 3)) -> bool:
    """Whether every scale belongs to one row of [*leading, rows, width], or there is none to be measured."""
    if str(quantizer.scale) == "one" and not isinstance(quantizer.scale_format, Quantizer):
        return True
    size = math.prod(int(number) for number in re.findall(r"\d+", str(quantizer.granularity)))
    tokens, width = 5 * size, 7 * size  # what the granularity's own sizes divide
    shape = quantizer.granularity.scale_shape((*leading, tokens, width))
    return shape[:-1] == (*leading, tokens)
