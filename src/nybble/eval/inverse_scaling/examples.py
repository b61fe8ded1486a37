"""Questions of inverse-scaling tasks: three kinds, as the prize published them, from CSV or JSONL.

    classification   prompt, classes, answer_index
    sequence_prob    prompt, completion
    logodds          prompt, other_prompt, classes (two), answer_index

A CSV holds ``classes`` as a list in Python's way of writing. No separator is put between a prompt and what follows it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.core.errors import DataError

KINDS = ("classification", "sequence_prob", "logodds")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row.

    Attributes:
        prompt: what a model reads. answers: what may follow it: the classes, or the one completion.
        right: which of them is right. other_prompt: of ``logodds``, the prompt that is compared with.
    """

    prompt: str
    answers: tuple[str, ...]
    right: int = 0
    other_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All rows of a file.

    Attributes:
        name: what to call them. kind: one of :data:`KINDS`. rows: in their order.
        source: a path, or how they were made.
        sha256: of the file's bytes, or of the rows that were made.
    """

    name: str
    kind: str
    rows: tuple[Question, ...]
    source: str
    sha256: str


def read_questions(path: str | Path, name: str | None = None) -> Questions:
    """Questions from a ``.csv`` or ``.jsonl`` file.

    Args:
        path: the file.
        name: what to call them; None: the file's name.

    Raises:
        DataError: the file can't be read, has no rows, or a row is wrong; names it, the first is row 1.
    """
    place = Path(path)
    try:
        raw = place.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place} can't be read ({error}); it has to be CSV or JSONL in UTF-8.") from error
    rows = _csv(text) if place.suffix == ".csv" else _jsonl(text, place)
    return questions(rows, name or place.stem, str(path), hashlib.sha256(raw).hexdigest())


def questions(rows: Sequence[Mapping[str, Any]], name: str, source: str, sha256: str | None = None) -> Questions:
    """Questions from rows by column.

    Args:
        rows: columns of one kind; further columns are ignored.
        name: what to call them.
        source: where they come from.
        sha256: of the file; None: of the rows.

    Raises:
        DataError: as :func:`read_questions`.
    """
    if not rows:
        raise DataError(f"{source} has no rows.")
    kind = _kind(rows[0], source)
    made = tuple(_question(row, kind, f"{source}, row {number}") for number, row in enumerate(rows, 1))
    bare = sum(not answer.startswith((" ", "\n")) for row in made for answer in row.answers)
    if bare:
        warnings.warn(
            f"{source}: {bare} answers begin without a space, so they join the last word of the prompt.", stacklevel=2
        )
    digest = sha256 or hashlib.sha256(json.dumps([dict(row) for row in rows], sort_keys=True).encode()).hexdigest()
    return Questions(name=name, kind=kind, rows=made, source=source, sha256=digest)


def _csv(text: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key} for row in csv.DictReader(io.StringIO(text))]


def _jsonl(text: str, place: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}, line {number}: no JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}, line {number}: a row is an object with columns by name; got {row!r:.40}.")
            rows.append(row)
    return rows


def _kind(row: Mapping[str, Any], source: str) -> str:
    if "prompt" in row and "completion" in row:
        return "sequence_prob"
    if "prompt" in row and "classes" in row:
        return "logodds" if "other_prompt" in row else "classification"
    raise DataError(
        f"{source} has columns {', '.join(row) or 'none'}; wanted are prompt, classes, answer_index (and "
        "other_prompt), or prompt, completion."
    )


def _question(row: Mapping[str, Any], kind: str, where: str) -> Question:
    columns = {"sequence_prob": ("prompt", "completion"), "classification": ("prompt", "classes", "answer_index")}
    for column in columns.get(kind, ("prompt", "other_prompt", "classes", "answer_index")):
        if row.get(column) is None:
            raise DataError(f"{where}: there is no {column}.")
    prompt = _text(row["prompt"], "prompt", where)
    if kind == "sequence_prob":
        completion = _text(row["completion"], "completion", where)
        if not completion:
            raise DataError(f"{where}: the completion is empty, so there is nothing to be judged.")
        return Question(prompt=prompt, answers=(completion,))
    classes = _classes(row["classes"], where)
    if kind == "logodds" and len(classes) != 2:
        raise DataError(f"{where}: log odds are of two classes; got {len(classes)}.")
    other = _text(row["other_prompt"], "other_prompt", where) if kind == "logodds" else None
    return Question(
        prompt=prompt, answers=classes, right=_index(row["answer_index"], len(classes), where), other_prompt=other
    )


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is a text; got {value!r:.40}.")
    return value


def _classes(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: classes are a list of texts; got {value!r:.60}.") from error
    found = tuple(value) if isinstance(value, list | tuple) else ()
    if len(found) < 2 or not all(isinstance(each, str) and each for each in found):
        raise DataError(f"{where}: classes are two or more texts, none empty; got {value!r:.60}.")
    return found


def _index(value: Any, count: int, where: str) -> int:
    try:
        index = int(value)
        whole = float(value) == index and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        index, whole = -1, False
    if not whole or not 0 <= index < count:
        raise DataError(f"{where}: answer_index is a number from 0 to {count - 1}; got {value!r:.20}.")
    return index
