"""Alembic's environment. `delta_sync.state` hands over a connection whose transaction it begins and ends itself."""

from __future__ import annotations

from alembic import context

from delta_sync.state_tables import METADATA, VERSION_TABLE

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("The state store is migrated by Delta itself, when it is opened.")

context.configure(connection=connection, target_metadata=METADATA, version_table=VERSION_TABLE)
context.run_migrations()
