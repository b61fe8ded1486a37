"""From any quantized model that nybble reads to any target that it writes.

1. open the model; ask the target what of it can't be held, before anything is written
2. no code changes, unless it is asked for: then those weights are rounded again, and the answer says by how much
3. from here on as :func:`nybble.pipelines.export.export`: one tensor in memory at a time, DEST appears whole
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nybble.core.errors import NybbleError, UsageError
from nybble.core.explicit import explicit_settings
from nybble.core.files import new_folder
from nybble.core.memory import new_objects_alone
from nybble.core.progress import Progress
from nybble.export import Cast, ExportTarget, Refusal, get_target, refusals, refuse
from nybble.export._recodings import Recoding
from nybble.export._rounded import RoundedSource
from nybble.export._rounding import AUTO, Changed, recodings, rounded, table
from nybble.export._source import Source
from nybble.pipelines.export import opened, written
from nybble.quantizer import Quantizer

_SHOWN = 3
_PASSES = 3  # until no layer is refused: for itself, then beside its siblings
_FLOATS = ("float32", "float16", "bfloat16", "f32", "f16", "bf16")


@explicit_settings()
@torch.no_grad()
@new_objects_alone()
def convert(
    model: str | Path,
    dest: str | Path,
    target: str,
    *,
    round: str = "",
    check: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a quantized model of any kind as another program loads it.

    Codes and scales are kept wherever the target has the same code book. Weights that it can't hold are refused, layer
    by layer, unless ``round`` says to what they are rounded; a type in the target's own option (``gguf:q4_k_m``) says
    so too. What was rounded in the first place can't be made good: from a float model, quantize for the target.

    Args:
        model: a folder that nybble, compressed-tensors, GPTQ, AWQ, bitsandbytes, ModelOpt or gpt-oss (MXFP4) wrote, a
            GGUF file, a hub id, ``demo:smollm2``; one in float for a target that takes that (``dense``, ``gguf``).
        dest: must not exist; it appears whole or not at all.
        target: a target's name, with its option behind a colon.
        round: a quantizer line for the weights that the target can't hold; ``auto`` takes the nearest, of about as
            many bits, that it holds. Embeddings are cast to the model's dtype where it holds no packed ones.
        check: open the result with the libraries that load it, and compare weights and logits with nybble's.
        announce: gets what will be lost or rounded, a line each, before anything is written.
        progress: gets tensors.

    Returns:
        as :func:`nybble.export`; and ``rounded``, for each pair of quantizers, types or dtypes ``layers``, ``from``,
        ``to``, ``codes_kept`` (scales alone were rounded, or a reciprocal of theirs), ``error``, the mean of
        ``|W - W'|^2 / |W|^2`` over these layers, and ``beside``, what else runtimes join with them, where one line had
        to do for different ones; empty where nothing was. ``recoded``: the same of layers whose codes are all kept and
        told in other words, with the same values.

    Raises:
        UsageError: no such target or line; a float model for a target of quantized ones. ModelError: the target can't
            hold a layer; every one is named, with the nearest that it holds. SchemeError: nor what ``round`` says.
            FileError: files that are damaged, in the way, or can't be written; or with ``check``, that differ.

    >>> import nybble
    >>> nybble.convert("model-gptq", "model-ct", "compressed-tensors")["rounded"]  # doctest: +SKIP
    []
    """
    dest = new_folder(dest, model)
    part = get_target(target)
    if round and round != AUTO:
        Quantizer(round)  # before the model is opened
    with opened(model, dest) as source:
        if not any(layer.weights for layer in source.layers.values()) and not part.in_float:
            raise UsageError(
                f"{model} is in float, and {target} is for quantized models: `nybble quantize {model} {dest} --target "
                f"{target}` makes one."
            )
        part.require(check)
        new, rows = _held(source, part, target, round)
        cast = _cast(part.casts(new))
        for row in (*rows, *cast):
            (announce or _ignore)(_said(row))
        found = written(new, dest, part, target, check=check, announce=announce, progress=progress)
    errors = (new.errors if isinstance(new, RoundedSource) else {}) | part.errors
    changed = [replace(row, layers=tuple(n for n in row.layers if errors.get(n) != 0)) for row in cast]
    rows += [row for row in changed if row.layers]
    return found | {
        "rounded": [_row(row, errors) for row in rows if row.rounds],
        "recoded": [_row(row, errors) for row in rows if not row.rounds],
    }


def _held(source: Source, part: ExportTarget, target: str, line: str) -> tuple[Source, list[Changed]]:
    """The source as the target holds it, and what had to be told in other words, or rounded, for that."""

    def bad(seen: Source) -> list[str]:
        refused = [name for refusal in _unheld(part, seen) for name in _layers(seen, refusal)]
        return [*refused, *(name for name in part.rounds(seen) if name not in refused)]

    asked, refusals = part.rounds(source), _unheld(part, source)
    if not asked and not any(_layers(source, refusal) for refusal in refusals):
        refuse(target, refusals, "Choose another target.")
        return source, []
    nudging = bool(line or part.option)
    kept = recodings(source, bad, nudging=nudging, rounding=line == AUTO or bool(asked))
    new = RoundedSource(source, {}, (), kept)
    left = bad(new)
    if left and (again := {name: quantizer for name, quantizer in part.rounds(new).items() if name in left}):
        new = RoundedSource(source, again, (), {n: r for n, r in kept.items() if n not in again})
        left = bad(new)
    for _ in range(_PASSES if left and line else 0):
        new = rounded(source, part, left, line, kept)
        more = [name for name in bad(new) if name not in left]
        if not more:
            break
        left = [*left, *more]  # what a target refuses of a whole it says once every part is held
    refusals = _unheld(part, new)
    helps = bool(left and not line and refusals) and _would_help(source, part, left, kept)
    refuse(target, refusals, _ASK if helps else "Choose another target.")
    return new, table(new, source)


_ASK = (
    "No code is changed without being asked: --round auto rounds these weights again, to the nearest that it holds, "
    "--round LINE to a quantizer of your choice. The float model, if there is one, loses less."
)


def _would_help(source: Source, part: ExportTarget, left: Sequence[str], kept: Mapping[str, Recoding]) -> bool:
    """Whether the target takes the model once its weights are rounded: no line makes another module of a layer."""
    try:
        return not _unheld(part, rounded(source, part, left, AUTO, kept))
    except NybbleError:
        return False


def _unheld(part: ExportTarget, source: Source) -> list[Refusal]:
    """What a target refuses, and what it would write with other values."""
    return [*refusals(part, source), *part.shifts(source)]


def _layers(source: Source, refusal: Refusal) -> Sequence[str]:
    """The layers of a refusal, which may name a weight of a layer."""
    owners = {prefix: layer.name for layer in source.layers.values() for prefix in layer.weights}
    return [owners.get(name, name) for name in refusal.layers if owners.get(name, name) in source.layers]


def _cast(casts: Sequence[Cast]) -> list[Changed]:
    alike: dict[tuple[str, str], list[str]] = {}
    for cast in casts:
        alike.setdefault((cast.came, cast.to), []).append(cast.name)
    return [Changed(layers=tuple(n), came=c, to=to, rounds=True, kept=False) for (c, to), n in alike.items()]


def _said(row: Changed) -> str:
    more = f" and {len(row.layers) - _SHOWN} more" if len(row.layers) > _SHOWN else ""
    what = ("cast" if row.to.lower() in _FLOATS else "rounded again") if row.rounds else "told otherwise"
    what = "rounded" if row.came in _FLOATS and what[0] == "r" else what
    why = f"; runtimes join them with layers of {row.beside}, so all get one line" if row.beside else ""
    return f"{what}, {row.came} to {row.to}: {', '.join(row.layers[:_SHOWN])}{more}{why}"


def _row(row: Changed, errors: dict[str, float]) -> dict[str, Any]:
    known = [errors[name] for name in row.layers if name in errors]
    mean = sum(known) / len(known) if known else None
    found = {"layers": list(row.layers), "from": row.came, "to": row.to, "codes_kept": row.kept, "error": mean}
    return found | ({"beside": row.beside} if row.beside else {})


def _ignore(line: str) -> None:
    return None
