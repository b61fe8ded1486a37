"""The grammar of a quantizer line: words in, the fields of a Quantizer out (their meaning: nybble.quantizer)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from nybble.core.errors import UsageError, did_you_mean
from nybble.formats import NumberFormat, closest, format_names, get_format
from nybble.formats.integer import IntFormat
from nybble.granularity import REGISTRY as GRANULARITIES
from nybble.granularity import Granularity, get_granularity, granularity_words, make_granularity, parse_granularity
from nybble.packing import get_layout
from nybble.presets import PRESETS
from nybble.rounding import get_rounding
from nybble.scales import ScaleRule, parse_scale_rule
from nybble.scales.absmax import AbsMax
from nybble.scales.minmax import MinMax
from nybble.scales.mse import Mse

PLAIN = ("float32", "float16", "bfloat16")
AUTO = "auto"  # of scale_format: as the model's own dtype, where that is known
TENSOR = make_granularity("tensor")  # what a line means that names none
WORDS = (
    "scale",
    "symmetric",
    "rounding",
    "scale_format",
    "offset_format",
    "reciprocal",
    "raw_scale",
    "floor",
    "center",
    "packing",
    "static",
)


DEFAULTS: dict[str, Any] = {
    "rounding": "nearest-even",
    "scale_format": None,  # see default_of
    "offset_format": None,
    "reciprocal": False,
    "raw_scale": False,
    "floor": "",
    "center": "",
    "packing": "dense",
}


def default_of(key: str, granularity: Granularity, scale: ScaleRule) -> Any:
    """What a line means that leaves the word ``key`` out."""
    if key in ("scale_format", "offset_format"):
        return scale.scale_format or granularity.scale_format if key == "scale_format" else granularity.scale_format
    return DEFAULTS[key]


def is_open(granularity: Granularity, scale: ScaleRule) -> bool:
    """Whether a line that leaves ``scale_format`` out lets a model say it: there are many scales, of 16 bits."""
    return not scale.scale_format and granularity.scale_format == "float16"


def split_words(line: str) -> dict[str, str]:
    """A line as ordered words, presets expanded: ``int4 group=32`` -> {"": "int4", "group": "32"}."""
    tokens = _tokens(line)
    if not tokens:
        raise UsageError("an empty quantizer line; the simplest is the name of a format, such as int4.")
    head, *rest = tokens
    words = split_words(PRESETS[head]) if head in PRESETS else {"": head}
    override(words, {key: value for key, _, value in (token.partition("=") for token in rest)})
    return words


def override(words: dict[str, str], new: dict[str, str]) -> None:
    """Change words in place; a new granularity replaces the old one, with the words that went with it."""
    if any(key in GRANULARITIES for key in new):
        for old in [word for word in words if word in GRANULARITIES]:
            for word in (old, *get_granularity(old).options):
                words.pop(word, None)
    words.update(new)


def _tokens(line: str) -> list[str]:
    """Split at spaces outside parentheses and brackets."""
    tokens, depth, word = [], 0, ""
    for char in line.strip():
        depth += (char in "([") - (char in ")]")
        if depth < 0:
            break
        if char.isspace() and depth == 0:
            tokens += [word] if word else []
            word = ""
        else:
            word += char
    if depth != 0:
        raise UsageError(f"unbalanced parentheses in quantizer line {line!r}.")
    return tokens + ([word] if word else [])


def parse_words(words: dict[str, str], line: str) -> dict[str, Any]:
    """Fields of a Quantizer; ``scale_format`` and ``offset_format`` as text, a nested line in its parentheses."""
    words = dict(words)
    name = words.pop("")
    granularity = parse_granularity(words) or TENSOR
    unknown = [key for key in words if key not in WORDS]
    if unknown:
        known = (*WORDS, *granularity_words())
        if unknown[0] in known:
            raise UsageError(f"quantizer {line!r}: {unknown[0]!r} doesn't go with '{granularity}'; leave it out.")
        raise UsageError(f"quantizer {line!r}: unknown word {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    try:
        fmt = get_format(name)
    except UsageError as error:
        if re.fullmatch(r"[\w.-]+", name) and name not in format_names() and "unknown number format" in str(error):
            known = (*format_names(), *PRESETS)
            raise UsageError(
                f"unknown format or preset {name!r}.{closest(name, known)} `nybble formats` lists them."
            ) from error
        raise
    scale = parse_scale_rule(words.get("scale", "absmax"))
    symmetric = _flag(words, "symmetric", True)
    if not symmetric and not scale.needs_integer and not scale.has_offset:
        if isinstance(scale, AbsMax):
            scale = MinMax()
        elif isinstance(scale, Mse):
            scale = replace(scale, asymmetric=True)
        else:
            raise UsageError(
                f"quantizer {line!r}: symmetric=false goes with scale=minmax or scale=mse, not scale={scale}."
            )
    if scale.needs_integer and isinstance(fmt, IntFormat) and fmt.is_signed and not fmt.full_range:
        fmt = get_format(f"int{fmt.bits}_full")  # a zero point uses every code
    floor, center = words.get("floor", ""), words.get("center", "")
    if floor not in ("", "normal", "subnormal"):
        raise UsageError(f"quantizer {line!r}: floor={floor}; it is normal or subnormal.")
    if center not in ("", "mean"):
        raise UsageError(f"quantizer {line!r}: center={center}; it is mean or left out.")
    rounding, packing = words.get("rounding", "nearest-even"), words.get("packing", "dense")
    rounding, packing = get_rounding(rounding).name, get_layout(packing).name
    follows = words.get("scale_format", AUTO) == AUTO
    if follows:
        words.pop("scale_format", None)
    return {
        "format": fmt,
        "granularity": granularity,
        "scale": scale,
        "rounding": rounding,
        **{key: words.get(key, default_of(key, granularity, scale)) for key in ("scale_format", "offset_format")},
        "reciprocal": _flag(words, "reciprocal", False),
        "raw_scale": _flag(words, "raw_scale", False),
        "floor": floor,
        "center": center,
        "packing": packing,
        "static": words.get("static", "false") in ("", "true"),
        "follows": follows and is_open(granularity, scale),
    }


def as_written(fmt: NumberFormat, scale: ScaleRule) -> tuple[str, list[str]]:
    """A format's name and a scale rule's words as people write them: integers with a zero point are ``int4`` again.

    >>> as_written(get_format("int4_full"), MinMax()), as_written(get_format("int4_full"), Mse(asymmetric=True))
    (('int4', ['symmetric=false']), ('int4', ['symmetric=false', 'scale=mse']))
    """
    if not scale.needs_integer:
        return fmt.name, [] if scale == AbsMax() else [f"scale={scale}"]
    full = isinstance(fmt, IntFormat) and fmt.is_signed and fmt.full_range and fmt.bits > 1
    name = f"int{fmt.bits}" if full else fmt.name
    if scale == MinMax():
        return name, ["symmetric=false"]
    if isinstance(scale, Mse):
        return name, ["symmetric=false", f"scale={replace(scale, asymmetric=False)}"]
    return name, [f"scale={scale}"]


def _flag(words: dict[str, str], key: str, default: bool) -> bool:
    text = words.get(key, str(default)).lower()
    if text not in ("true", "false", ""):
        raise UsageError(f"{key}={text}: say true or false.")
    return text != "false"
