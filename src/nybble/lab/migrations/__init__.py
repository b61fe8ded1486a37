"""From one schema of the store to the next, by Alembic: one file a step in ``versions``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, text

from nybble.core.errors import StoreError

HEAD = "r0001"
"""The schema that this nybble knows; a new step changes it."""


def schema_of(connection: Connection) -> str | None:
    """The schema that a database has; None where it holds nothing.

    Raises:
        StoreError: it holds something else than a store.
    """
    names = set(inspect(connection).get_table_names())
    if "alembic_version" in names and "runs" in names:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return None if found is None else str(found)
    if names:
        raise StoreError(
            f"the database has tables ({', '.join(sorted(names)[:4])}) and none of a lab; give an empty one."
        )
    return None


def migrate(connection: Connection) -> None:
    """Bring a database to the schema that this nybble knows, within the connection's transaction.

    Raises:
        StoreError: its schema is a newer one.
    """
    found = schema_of(connection)
    if found == HEAD:
        return
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(__file__).parent))
    known = {revision.revision for revision in script.walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"the store has the schema {found!r}, of a newer nybble; this one knows up to {HEAD!r}. Update nybble, or "
            "export the store there and merge the file into a new store."
        )

    def steps(revision: Any, context: Any) -> Any:
        return script._upgrade_revs(HEAD, revision)

    from alembic.operations import Operations

    context = MigrationContext.configure(connection, opts={"fn": steps})
    with Operations.context(context):
        context.run_migrations()
