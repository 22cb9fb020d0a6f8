"""`make playground`: the demo's servers, and a shell in which to type at them. Its end is theirs.

    python -m examples.demo.playground [--rows 1000]

In the shell `deltactl`, `psql` and `redis-cli` are found; SOURCE, CACHE and RATINGS_URL hold the URLs.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from examples.demo.stage import Stage
from rich.console import Console

from delta_sync.errors import DeltaError

out = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the shell; return its exit status."""
    parser = argparse.ArgumentParser(prog="make playground", description="Real servers and a shell.")
    parser.add_argument("--rows", type=int, default=1000, help="rows that are there from the beginning")
    options = parser.parse_args()
    try:
        with Stage(options.rows) as stage:
            out.print("PostgreSQL, Redis and the ratings service run; type [bold]exit[/] to end them.")
            out.print(f"  $SOURCE       {stage.source_url}")
            out.print(f"  $CACHE        {stage.redis.url}")
            out.print(f"  $RATINGS_URL  {stage.ratings_url}")
            shell = subprocess.Popen(_shell(), cwd=stage.folder, env=stage.environment | {"PS1": "playground$ "})
            while True:
                try:
                    return shell.wait()
                except KeyboardInterrupt:  # it is for what runs in the shell
                    continue
    except DeltaError as error:
        out.print(f"[bold red]✗[/] {error}")
        return 1


def _shell() -> list[str]:
    """Return the command of a shell that leaves the environment as it is given."""
    bash = shutil.which("bash")
    return [bash, "--norc"] if bash else ["/bin/sh"]


if __name__ == "__main__":
    sys.exit(main())
