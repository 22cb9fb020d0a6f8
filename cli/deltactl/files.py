"""Writing several files so that all of them are there, or none."""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

from delta_sync.errors import DeltaError

FOLDER_MODE = 0o755  # mkdtemp makes it 0700, and a pipeline's files hold no secrets


def read_all(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the texts of those files that exist. What is no UTF-8 is replaced: they are compared, not written."""
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = (folder / name).read_text(encoding="utf-8", errors="replace")
    return found


def diff(folder: Path, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return how the new files differ from the old ones, as a unified diff; empty when they do not. Pure."""
    lines: list[str] = []
    for name, text in new.items():
        before = old.get(name, "")
        if before != text:
            path = str(folder / name)
            source = path if name in old else "/dev/null"
            lines += difflib.unified_diff(
                before.splitlines(keepends=True), text.splitlines(keepends=True), source, path, n=2
            )
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def write_all(folder: Path, files: Mapping[str, str]) -> None:
    """Write all of these files, or leave everything as it was, folders included. Names may begin with `../`.

    A new folder appears at once, complete. In one that exists files are replaced one by one, and put back if a later
    one fails. Raises OSError, or DeltaError when somebody else made the folder meanwhile.
    """
    inside = {name: text for name, text in files.items() if not name.startswith("../")}
    beside = {name.removeprefix("../"): text for name, text in files.items() if name.startswith("../")}
    with _parents(folder.parent):
        if folder.exists():
            with _replaced(folder.parent, beside), _replaced(folder, inside):
                return
        with _replaced(folder.parent, beside):
            staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                for name, text in inside.items():
                    (staged / name).write_text(text, encoding="utf-8")
                staged.chmod(FOLDER_MODE)
                try:
                    staged.rename(folder)
                except OSError as error:
                    if folder.exists():
                        raise DeltaError(f"{folder} was made by somebody else at this moment; try again.") from error
                    raise
            finally:
                shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def _parents(folder: Path) -> Generator[None]:
    """Make a folder and those above it; remove those that were made when the body fails."""
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir()
                made.append(path)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _replaced(folder: Path, files: Mapping[str, str]) -> Generator[None]:
    """Replace files, each in one step; put the old ones back when that or the body fails."""
    staged: dict[str, Path] = {}
    before: dict[str, bytes | None] = {}
    try:
        for name, text in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
            staged[name] = Path(temporary)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            target = folder / name
            staged[name].chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        for name, path in staged.items():
            target = folder / name
            old = target.read_bytes() if target.exists() else None
            path.replace(target)
            before[name] = old
        yield
    except BaseException:
        for name, old in before.items():
            if old is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(old)
        raise
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
