"""Opening the database of a store: SQLite in a file, or PostgreSQL; and its errors in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.core.errors import FileError, StoreError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine, Table
    from sqlalchemy.sql.elements import ColumnElement

INSTALL = "pip install 'nybble[lab]'"
WAIT = 60
"""Seconds that a process waits for another one's write to a SQLite file."""


def is_file(place: str) -> bool:
    """Whether a store's place is a file, and not the address of a database."""
    return "://" not in place


def open_engine(place: str) -> Engine:
    """An engine for a file's path, or ``postgresql://USER:PASSWORD@HOST/DATABASE``.

    Raises:
        UsageError: another kind of database, a malformed address, or a package is missing. FileError: no such folder.
    """
    try:
        import sqlalchemy
    except ImportError as error:
        raise UsageError(f"the lab keeps its runs with SQLAlchemy: {INSTALL}") from error
    if is_file(place):
        return _open_file(Path(place))
    try:
        url = sqlalchemy.make_url(place)
    except sqlalchemy.exc.ArgumentError as error:
        raise UsageError("a store is a file, or postgresql://USER:PASSWORD@HOST/DATABASE.") from error
    if url.get_backend_name() != "postgresql":
        raise UsageError(f"a store is a SQLite file or a PostgreSQL database; got {url.get_backend_name()}://.")
    return _open_server(url)


def _open_file(path: Path) -> Engine:
    from sqlalchemy import create_engine, event

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise FileError(f"{path}: " + ("it is a folder." if path.is_dir() else f"there is no folder {path.parent}."))
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": WAIT, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def settle(connection: Any, record: Any) -> None:
        for line in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {line}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # a transaction that begins as a reader can't always become a writer
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")

    return engine


def _open_server(url: URL) -> Engine:
    from sqlalchemy import create_engine

    try:
        return create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except ImportError as error:
        raise UsageError("stores in PostgreSQL need psycopg: pip install 'nybble[lab]'") from error


def shown(place: str) -> str:
    """A store's place for messages, without its password."""
    if is_file(place):
        return place
    from sqlalchemy import make_url

    return make_url(place).render_as_string(hide_password=True)


@contextmanager
def database_errors(place: str) -> Iterator[None]:
    """Turn what a database says inside into a StoreError that names the store and a way out."""
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except DBAPIError as error:
        raise StoreError(f"{shown(place)}: {_words(str(error.orig).strip(), is_file(place))}") from error


def _words(text: str, file: bool) -> str:
    if "disk is full" in text or "No space left" in text:
        return "the disk is full. Free some space and repeat the command: finished runs are kept, others run again."
    if "is locked" in text:
        return f"another process has been writing for {WAIT} s. Repeat the command when it is done."
    if "not a database" in text or "malformed" in text:
        return f"it is no store of a lab, or is damaged ({text}). Choose another file."
    if file:
        return f"it can't be read or written ({text})."
    first = text.splitlines()[0]
    return f"the database can't be reached or refuses ({first}). Finished runs are kept: repeat the command."


def now(connection: Connection) -> ColumnElement[float]:
    """The database's own clock, in seconds since 1970: workers on several machines have no other in common."""
    from sqlalchemy import Float, literal_column

    if connection.dialect.name == "sqlite":
        return literal_column("((julianday('now') - 2440587.5) * 86400.0)", Float())
    return literal_column("extract(epoch from clock_timestamp())::float8", Float())


def insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert rows whose key isn't there yet, all with the same columns; how many were new.

    PostgreSQL gets them as one JSON text: as parameters, tens of thousands of rows take it and its driver many times as
    long.
    """
    if not rows:
        return 0
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert

        return connection.execute(insert(table).on_conflict_do_nothing(), list(rows)).rowcount
    from sqlalchemy import JSON, Integer, text

    kinds = {JSON: "json", Integer: "integer"}
    names = ", ".join(rows[0])
    typed = ", ".join(f"{name} {kinds.get(type(table.c[name].type), 'text')}" for name in rows[0])
    line = (
        f"INSERT INTO {table.name} ({names}) SELECT {names} "
        f"FROM json_to_recordset(CAST(:rows AS json)) AS given({typed}) ON CONFLICT DO NOTHING"
    )
    return connection.execute(text(line), {"rows": json.dumps(rows)}).rowcount
