"""KVFormat: what a KV cache stores, and the line that says it.

A quantizer line, ``residual=N`` (the newest N tokens stay in float), or keys and values apart:
``keys=(bfp12) values=(int8 token) residual=32``; ``none`` is float.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from nybble.core.errors import SchemeError, did_you_mean
from nybble.line import split_words
from nybble.quantizer import Quantizer
from nybble.rounding import get_rounding

_SIDES = ("keys", "values")


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

    Raises:
        SchemeError: a quantizer whose scales are shared between tokens, calibrated, or drawn by chance.

    >>> str(KVFormat(keys=Quantizer("nvfp4"), values=Quantizer("nvfp4"), residual=16))
    'float4_e2m1fn group=16 scale_format=(float8_e4m3fn token floor=normal) residual=16'
    """

    keys: Quantizer | None
    values: Quantizer | None
    residual: int = 0
    lines: tuple[str, str] = field(init=False, repr=False, compare=False)
    """Of keys and values, as operators take them; empty for float."""

    def __post_init__(self) -> None:
        if type(self.residual) is not int or self.residual < 0:
            raise SchemeError(f"residual={self.residual}: the number of newest tokens left in float is 0 or more.")
        for side in _SIDES:
            quantizer = getattr(self, side)
            if quantizer is not None:
                object.__setattr__(self, side, _of_tokens(quantizer))
        object.__setattr__(self, "lines", tuple(str(getattr(self, side) or "") for side in _SIDES))

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
        return KVFormat(keys=made["keys"], values=made["values"], residual=self.residual)

    def __str__(self) -> str:
        if self.keys == self.values:
            words = str(self.keys or "none")
        else:
            words = " ".join(f"{side}=({getattr(self, side) or 'none'})" for side in _SIDES)
        return words + (f" residual={self.residual}" if self.residual else "")

    @staticmethod
    def parse(line: str) -> KVFormat:
        """Inverse of ``str``; the grammar is in this module's docstring.

        Raises:
            UsageError: an unknown word. SchemeError: what a cache can't store.
        """
        words = split_words(line)
        residual = words.pop("residual", "0")
        if not residual.isdecimal():
            raise SchemeError(f"residual={residual}: the number of newest tokens left in float is 0 or more.")
        head = words.pop("")
        sides = dict([head.split("=", 1)]) if head.startswith(("keys=", "values=")) else {}
        if sides:
            sides |= words
            wrong = next((f" {key!r}?{did_you_mean(key, _SIDES)}" for key in sides if key not in _SIDES), "")
            if wrong or len(sides) < 2:
                raise SchemeError(f"{line!r}: say keys=(...) and values=(...), or one line for both.{wrong}")
            found = {side: _stored(text.removeprefix("(").removesuffix(")")) for side, text in sides.items()}
            return KVFormat(keys=found["keys"], values=found["values"], residual=int(residual))
        both = _stored(" ".join([head, *(f"{key}={value}" if value else key for key, value in words.items())]))
        return KVFormat(keys=both, values=both, residual=int(residual))


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
    if not _fits_tokens(quantizer):
        name, _, size = str(quantizer.granularity).rpartition("=")
        columns = size.rpartition("x")[2] if name in ("flat", "block") else ""
        instead = f"{quantizer.format} group={columns}" if columns else f"{quantizer.format} token"
        raise SchemeError(
            f"{quantizer}: a KV cache grows token by token, and '{quantizer.granularity}' has scales that tokens "
            f"share, which later tokens would change. Write '{instead}', or 'group=N' for several scales a token; or "
            f"'{quantizer.format} tensor static' for one scale a layer, calibrated."
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
