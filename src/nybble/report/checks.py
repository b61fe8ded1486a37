"""Is this what a manifest and an evaluation look like? Checked before a page is made, so the page need not doubt it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nybble.core.errors import FileError, FormatError
from nybble.formats import get_format
from nybble.report.words import task_of

Check = Callable[[Any], bool]
MOST_BINS = 256
SOUND = "data:audio/wav;base64,"


def check_manifest(manifest: dict[str, Any], place: object) -> None:
    """Refuse a manifest without a recipe or layers, and layers whose values or pictures are not what they should be.

    Args:
        manifest: nybble.json.
        place: the file, for messages.

    Raises:
        FileError: what is wrong, of which layer.
    """
    if not isinstance(manifest.get("recipe"), dict):
        raise _damaged(place, "it names no recipe")
    rows = manifest.get("layers")
    if not isinstance(rows, list) or not rows:
        raise _damaged(place, "it lists no layers")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not _text(row.get("name")):
            raise _damaged(place, f"layer {number} has no name")
        for key, (needed, good) in FIELDS.items():
            if key not in row and not needed:
                continue
            if key not in row:
                raise _damaged(place, f"layer {row['name']!r} has no {key!r}")
            if not good(row[key]):
                raise _damaged(place, f"layer {row['name']!r} has {key} = {_short(row[key])}")


def check_evaluation(evaluation: dict[str, Any], place: object) -> None:
    """Refuse an evaluation whose models, data or samples are not what they should be.

    Args:
        evaluation: evaluation.json.
        place: the file, for messages.

    Raises:
        FileError: what is wrong.
    """
    models, samples = evaluation.get("models", {}), evaluation.get("samples", [])
    if not isinstance(models, dict) or not all(isinstance(found, dict) for found in models.values()):
        raise _damaged(place, "'models' is not a table of metrics")
    if not isinstance(evaluation.get("data", {}), dict):
        raise _damaged(place, "'data' does not describe a text")
    if not isinstance(samples, list) or not all(_sample(found) for found in samples):
        raise _damaged(place, "'samples' are not texts with a prompt")


def check_times(times: Any, place: object) -> None:
    """Refuse times that are no lists of seconds by a window's name.

    Args:
        times: times.json.
        place: the file, for messages.

    Raises:
        FileError: what is wrong.
    """
    for window, seconds in times.items():
        if not _list(_positive, 0, MOST_BINS)(seconds):
            raise _damaged(place, f"{window!r} took {_short(seconds)}")


def check_training(training: dict[str, Any], place: object) -> None:
    """Refuse the record of a training run whose numbers or texts are not what they should be.

    Args:
        training: training.json.
        place: the file, for messages.

    Raises:
        FileError: what is wrong.
    """
    for key, good in TRAINING.items():
        if (key not in training and key not in ADDED) or not good(training.get(key, ADDED.get(key))):
            raise _damaged(place, f"{key} = {_short(training.get(key))}", "train")
    if not all(map(_text, map(task_of(training).get, ("name", "unit", "shown")))):
        raise _damaged(place, f"task = {_short(training['task'])}", "train")
    if any(len(values) != len(training["curve"]) for values in training.get("losses", {}).values()):
        raise _damaged(place, "'losses' are not those of the curve's updates", "train")
    for found in training.get("callbacks", {}).values():
        if any(len(values) != len(training["curve"]) for values in found["updates"].values()):
            raise _damaged(place, "'callbacks' are not those of the curve's updates", "train")
    evaluation = training["evaluation"]
    if evaluation is None:
        return
    check_evaluation(evaluation, place)
    models = evaluation.get("models", {})
    before, after = models.get("before", {}), models.get("after", {})
    numbers = all(map(_number, (value for found in models.values() for value in found.values())))
    if not numbers or task_of(training)["shown"] not in before or before.keys() != after.keys():
        raise _damaged(place, "'models' has no losses before and after", "train")
    if not all({"before", "after", "target"} <= found.keys() for found in evaluation.get("samples", [])):
        raise _damaged(place, "'samples' lack answers", "train")


def _damaged(place: object, what: str, command: str = "quantize") -> FileError:
    return FileError(f"{place}: {what}. The file is damaged or from another nybble; run `nybble {command}` again.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and _positive(value)


def _list(item: Check, least: int, most: int) -> Check:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(item, value))


def _maybe(good: Check) -> Check:
    return lambda value: value is None or good(value)


def _format(value: Any) -> bool:
    try:
        return _text(value) and get_format(value) is not None
    except FormatError:
        return False


def _histogram(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _number(value.get("edge"))
        and value["edge"] > 0
        and _list(_count, 2, MOST_BINS)(value.get("counts"))
        and _positive(value.get("clipped"))
        and ("format" not in value or _format(value["format"]))
        and _list(_list(_number, 2, 2), 0, MOST_BINS)(value.get("thresholds", []))
    )


def _input_picture(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _histogram(value.get("histogram"))
        and _positive(value.get("inter"))
        and _positive(value.get("intra"))
        and _list(_list(_positive, 2, 2), 1, MOST_BINS)(value.get("channels"))
    )


def _window(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _text(value.get("window"))
        and _text(value.get("loss"))
        and all(_count(value.get(key)) for key in ("blocks", "steps"))
        and all(_positive(value.get(key)) for key in ("before", "after"))
        and (_text(value.get("kept")) or _count(value.get("kept")))
        and isinstance(value.get("diverged"), bool)
        and _text(value.get("precision", ""))
        and _list(_list(_positive, 2, 2), 0, MOST_BINS)(value.get("curve", []))
    )


def _learned(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _list(_window, 0, MOST_BINS)(value.get("windows", []))
        and all(_positive(value.get(key, 0)) for key in ("left_nearest", "codes"))
        and all(_list(_number, 3, 3)(value[key]) for key in ("scales", "input_scales") if key in value)
    )


def _sample(value: Any) -> bool:
    """Texts, and perhaps a sound that the page holds itself."""
    texts = isinstance(value, dict) and "prompt" in value and all(map(_text, value.values()))
    return texts and str(value.get("audio", SOUND)).startswith(SOUND)


def _callback(value: Any) -> bool:
    """Numbers of updates and of layers; every layer has the same."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), dict) for key in ("updates", "layers")):
        return False
    updates, layers = value["updates"].values(), [*value["layers"].values()]
    numbers = all(isinstance(row, dict) and all(map(_number, row.values())) for row in layers)
    return numbers and all(map(_list(_number, 0, 1 << 30), updates)) and len({tuple(row) for row in layers}) < 2


FIELDS: dict[str, tuple[bool, Check]] = {
    "shape": (True, _list(_count, 1, 8)),
    "weights": (True, _maybe(_text)),
    "inputs": (True, _maybe(_text)),
    "outputs": (True, _maybe(_text)),
    "bits": (True, _positive),
    "sqnr": (True, _maybe(_number)),
    "error": (True, _maybe(_positive)),
    "rtn_error": (True, _maybe(_positive)),
    "input_scale": (False, _maybe(_number)),
    "input_shifts": (False, _maybe(_list(_count, 1, MOST_BINS))),
    "clip": (False, _maybe(_list(_number, 3, 3))),
    "learned": (False, _maybe(_learned)),
    "notes": (False, _list(_text, 0, MOST_BINS)),
    "weight_picture": (False, _maybe(_histogram)),
    "input_picture": (False, _maybe(_input_picture)),
}
"""What a layer has: whether it must be there, and what is good."""

TRAINING: dict[str, Check] = {
    "method": _text,
    "model": _text,
    "steps": _count,
    "stages": lambda value: _list(_count, 1, MOST_BINS)(value) and sum(value) > 0,
    "trainable": _count,
    "data": lambda value: isinstance(value, dict) and all(_count(value.get(key)) for key in ("examples", "targets")),
    "curve": lambda value: isinstance(value, list) and all(map(_list(_number, 2, 2), value)),
    "losses": lambda value: isinstance(value, dict) and all(map(_list(_number, 0, 1 << 30), value.values())),
    "callbacks": lambda value: isinstance(value, dict) and all(map(_callback, value.values())),
    "memory": lambda value: isinstance(value, dict) and all(map(_count, value.values())),
    "evaluation": _maybe(lambda value: isinstance(value, dict)),
    "versions": lambda value: isinstance(value, dict) and _text(value.get("nybble")),
}
"""What the record of a training run must have."""

ADDED: dict[str, Any] = {"stages": [1], "losses": {}, "callbacks": {}}
"""Of that, what older records lack, with something good in its place."""
