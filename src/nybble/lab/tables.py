"""The tables of a store, as SQLAlchemy has them; :mod:`nybble.lab.migrations` makes them."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()

RUNS = Table(
    "runs",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order in which runs are claimed
    Column("key", String(64), nullable=False, unique=True),
    Column("kind", String(100), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("state", String(10), nullable=False),
    Column("attempt", Integer, nullable=False),  # how often it was claimed; with `worker`, what a claim is known by
    Column("worker", String(200)),
    Column("lease_until", Float),  # seconds since 1970 of the database's clock
    Column("error", Text),
    Column("result", JSON),
    Column("environment", JSON),
    Column("seconds", Float),
    Column("finished", Float),
    Index("runs_by_state", "state", "number"),
)
"""States: ``queued``, ``running``, ``done``, ``failed``, ``illegal``."""

SWEEPS = Table(
    "sweeps",
    METADATA,
    Column("name", String(100), primary_key=True),
    Column("source", JSON, nullable=False),
)

MEMBERS = Table(
    "members",
    METADATA,
    Column("sweep", String(100), ForeignKey("sweeps.name"), primary_key=True),
    Column("key", String(64), ForeignKey("runs.key"), primary_key=True),
    Column("labels", JSON, nullable=False),
)
