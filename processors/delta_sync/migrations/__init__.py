"""Migrations of the state store, forward only: `delta_sync.state` runs them when it opens a store that is older."""

from __future__ import annotations

import threading

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

_ALEMBIC = threading.Lock()  # its environment is global to the process


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "delta_sync:migrations")
    return config


def known() -> set[str]:
    """Return the revisions that there are."""
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def newest() -> str | None:
    """Return the revision that `upgrade` leads to."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def upgrade(connection: sa.Connection) -> None:
    """Bring the tables up to date, or make them; nothing happens when they are."""
    config = _config()
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, "head")
