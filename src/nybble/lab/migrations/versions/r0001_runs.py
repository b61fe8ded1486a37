"""Runs, sweeps, and which runs a sweep has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of the first schema."""
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("kind", sa.String(100), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(200)),
        sa.Column("lease_until", sa.Float),
        sa.Column("error", sa.Text),
        sa.Column("result", sa.JSON),
        sa.Column("environment", sa.JSON),
        sa.Column("seconds", sa.Float),
        sa.Column("finished", sa.Float),
    )
    op.create_index("runs_by_state", "runs", ["state", "number"])
    op.create_table(
        "sweeps",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("source", sa.JSON, nullable=False),
    )
    op.create_table(
        "members",
        sa.Column("sweep", sa.String(100), sa.ForeignKey("sweeps.name"), primary_key=True),
        sa.Column("key", sa.String(64), sa.ForeignKey("runs.key"), primary_key=True),
        sa.Column("labels", sa.JSON, nullable=False),
    )
