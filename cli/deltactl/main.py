"""The command `deltactl`."""

from __future__ import annotations

import sys

try:
    import click

    from deltactl.app import DeltaGroup, shared_options
except KeyboardInterrupt:
    # Imports take longer than anything else that a short command does, so Ctrl-C often comes here. `app.INTERRUPTED`
    # may not be there yet.
    sys.exit(130)

COMMANDS = {
    "completion": "deltactl.completion:completion",
    "dead": "deltactl.dead:dead",
    "dump": "deltactl.dump:dump",
    "pipeline": "deltactl.pipeline:pipeline",
    "refresh": "deltactl.refresh:refresh",
    "run": "deltactl.run:run",
    "sidecar": "deltactl.sidecar:sidecar",
    "status": "deltactl.status:status",
    "verify": "deltactl.verify:verify",
    "worker": "deltactl.worker:worker",
}


@click.group(
    cls=DeltaGroup,
    modules=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="delta-sync", prog_name="deltactl")
@shared_options
def main() -> None:
    """Keep caches, read models and search indexes in step with the database that is the source of truth.

    \b
    Start with:
      deltactl pipeline create movies --source postgresql://delta@db/studio \\
          --table public.movie --sink cache=redis://cache/0
    """


if __name__ == "__main__":
    main(prog_name="deltactl")
