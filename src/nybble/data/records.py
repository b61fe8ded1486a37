"""Records of a file, each of which becomes something: all of them, or one error that says where every bad one is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from nybble.core.errors import DataError, UsageError
from nybble.data.sources import json, table
from nybble.data.text import check_source, check_text

SHOWN = 5
"""Places of bad records that an error names beside the first."""
Made = TypeVar("Made")


def records(src: str) -> Iterable[tuple[Any, str]] | None:
    """Each record of JSON lines, a JSON list or a table (CSV, TSV), and where it stands; None for another SRC.

    Raises:
        UsageError: an empty SRC. FileError, DataError: it can't be read, or is malformed (perhaps only while read).
    """
    check_source(src)
    if json.PART.accepts(src):
        return json.json_rows(src)
    return table.table_rows(src) if table.PART.accepts(src) else None


def needed_records(src: str, fields: str) -> Iterable[tuple[Any, str]]:
    """As :func:`records`, for data that can't be anything else; ``fields`` are those that a record has.

    Raises:
        UsageError: SRC is of another kind, too.
    """
    found = records(src)
    if found is None:
        raise UsageError(
            f"data {src!r} holds no records; what this model is trained on is a .jsonl, .json, .csv or .tsv file whose "
            f"records have {fields}."
        )
    return found


def parsed(src: str, rows: Iterable[tuple[Any, str]], parse: Callable[[Any, str], Made]) -> list[Made]:
    """What ``parse``, called with a record and its place, makes of each.

    Raises:
        DataError: of the first bad record, with the places of the others; or there is no record.
    """
    found: list[Made] = []
    bad: list[tuple[str, DataError]] = []
    for row, place in rows:
        try:
            found.append(parse(row, place))
        except DataError as error:
            bad.append((place.removeprefix(f"{src}, "), error))
    if len(bad) > 1:
        more = [place for place, _ in bad[1:]]
        rest = f" and {len(more) - SHOWN:,} more" if len(more) > SHOWN else ""
        raise DataError(f"{bad[0][1]} Bad too: {', '.join(more[:SHOWN])}{rest}.") from bad[0][1]
    if bad:
        raise bad[0][1]
    if not found:
        raise DataError(f"data {src!r} holds no record.")
    return found


def string(value: Any, key: str, place: str) -> str:
    """A field's value.

    Raises:
        DataError: it is no string, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} is a {type(value).__name__}; it must be a string.")
    return check_text(value, place)
