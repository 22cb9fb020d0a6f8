"""The command `deltactl`."""

from __future__ import annotations

import click

from deltactl.app import DeltaGroup, shared_options
from deltactl.completion import completion
from deltactl.dead import dead
from deltactl.pipeline import pipeline
from deltactl.run import run
from deltactl.status import status


@click.group(cls=DeltaGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="delta-sync", prog_name="deltactl")
@shared_options
def main() -> None:
    """Keep caches, read models and search indexes in step with the database that is the source of truth.

    \b
    Start with:
      deltactl pipeline create movies --source postgresql://delta@db/studio \\
          --table public.movie --sink cache=redis://cache/0
    """


for command in (pipeline, run, status, dead, completion):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="deltactl")
