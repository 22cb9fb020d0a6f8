"""The reference of all commands, from the commands: `python -m deltactl.reference > docs/reference/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from deltactl.main import main

PAGE = "docs/reference/cli.md"
HEAD = """# Commands

Written from the commands themselves by `python -m deltactl.reference`; do not edit.

Exit status: 0 done; 1 a check failed, or something was refused; 2 wrong usage; 130 ended by Ctrl-C. Errors are
sentences on standard error (with `--json`: one JSON object with `error` and `problems`). Secrets are never printed.
"""
WIDTH = 100  # of the help texts, whatever terminal this runs in


def reference() -> str:
    """Return the page."""
    return HEAD + "".join(_sections(main, "deltactl", None))


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    settings: dict[str, Any] = {**command.context_settings, "max_content_width": WIDTH, "terminal_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            assert child is not None, child_name
            yield from _sections(child, child_name, context)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
