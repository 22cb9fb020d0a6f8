"""The reference of all commands, from the commands: `python -m deltactl.reference > docs/reference/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

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
    return HEAD + "".join(_sections(main, "deltactl"))


def _sections(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(command, info_name=path, max_content_width=WIDTH, terminal_width=WIDTH)
    yield f"\n## {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from _sections(child, f"{path} {name}")


if __name__ == "__main__":
    click.echo(reference(), nl=False)
