"""The command `deltactl`."""

from __future__ import annotations

import gc
import sys

# What imports make stays: to look through it again and again took a fifth of a short command's time.
gc.set_threshold(200_000, 10, 10)

try:
    import click

    from deltactl.app import DeltaGroup, Later, shared_options
except KeyboardInterrupt:
    # Imports take longer than anything else that a short command does, so Ctrl-C often comes here. `app.INTERRUPTED`
    # may not be there yet.
    sys.exit(130)

COMMANDS = {
    "completion": Later("deltactl.completion:completion", "Print the completion script of a shell."),
    "dead": Later("deltactl.dead:dead", "Look at changes that could not be processed."),
    "dump": Later("deltactl.dump:dump", "Read rows from the source again, at any time."),
    "pipeline": Later("deltactl.pipeline:pipeline", "Create, look at, try, package, rebuild and delete pipelines."),
    "refresh": Later("deltactl.refresh:refresh", "Enrich documents again: a look-up's answers have changed."),
    "run": Later("deltactl.run:run", "Run a pipeline, until Ctrl-C or SIGTERM."),
    "sidecar": Later("deltactl.sidecar:sidecar", "Run the connector of a pipeline on Kafka."),
    "status": Later("deltactl.status:status", "Show what a pipeline does, once or all the time."),
    "verify": Later("deltactl.verify:verify", "Prove that the sinks are equal to the source; repair."),
    "worker": Later("deltactl.worker:worker", "Run a worker of a pipeline on Kafka."),
}


@click.group(
    cls=DeltaGroup,
    later=COMMANDS,
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
