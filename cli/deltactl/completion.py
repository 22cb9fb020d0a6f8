"""`deltactl completion`: the script that lets a shell complete commands, options and the names of pipelines."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from deltactl.app import App, pass_app, print_json, say, shared_options, warn

VARIABLE = "_DELTACTL_COMPLETE"
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/deltactl",
    "zsh": "~/.zfunc/_deltactl (with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)",
    "fish": "~/.config/fish/completions/deltactl.fish",
}


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(tuple(PLACES)))
@shared_options
@click.pass_context
@pass_app
def completion(app: App, context: click.Context, shell: str) -> None:
    """Print the completion script of a shell; where to put it is printed when a person looks.

    \b
    Example:
      deltactl completion bash > ~/.local/share/bash-completion/completions/deltactl
    """
    cls = get_completion_class(shell)
    assert cls is not None, shell
    root = context.find_root()
    script = cls(root.command, {}, "deltactl", VARIABLE).source().rstrip("\n")
    if app.json:
        print_json({"shell": shell, "place": PLACES[shell], "script": script}, has_secrets=False)
        return
    say(script, has_secrets=False)
    if sys.stdout.isatty():
        warn(f"\nPut this into {PLACES[shell]}, and start a new shell.")
