"""Several files are written together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltactl.files import diff, read_all, write_all

FILES = {"a": "1\n", "b": "2\n", "../beside": "3\n"}


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "/" for path in folder.rglob("*")}


def test_a_new_folder_with_those_above_it(tmp_path: Path) -> None:
    write_all(tmp_path / "x" / "y" / "movies", FILES)
    assert everything(tmp_path / "x" / "y") == {"movies": "/", "movies/a": "1\n", "movies/b": "2\n", "beside": "3\n"}
    assert (tmp_path / "x" / "y" / "beside").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("bad", ["no/such/folder", "a\0b"])
def test_a_failure_leaves_no_new_folder(tmp_path: Path, bad: str) -> None:
    with pytest.raises((OSError, ValueError)):
        write_all(tmp_path / "x" / "movies", {**FILES, bad: "4\n"})
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("bad", ["no/such/folder", "../no/such/folder", "is_a_folder"])
def test_a_failure_puts_old_files_back(tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "movies"
    write_all(folder, {"a": "old\n"})
    (folder / "is_a_folder" / "full").mkdir(parents=True)
    (folder / "mine").write_text("untouched\n")
    before = everything(tmp_path)
    with pytest.raises(OSError, match=r"."):
        write_all(folder, {**FILES, bad: "4\n"})
    assert everything(tmp_path) == before


def test_files_that_are_there_are_replaced_and_others_kept(tmp_path: Path) -> None:
    folder = tmp_path / "movies"
    write_all(folder, FILES)
    (folder / "mine").write_text("untouched\n")
    (folder / "a").chmod(0o600)
    write_all(folder, {"a": "new\n", "../beside": "new\n"})
    assert read_all(folder, ["a", "b", "mine", "absent"]) == {"a": "new\n", "b": "2\n", "mine": "untouched\n"}
    assert (folder / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "beside").read_text() == "new\n"


def test_a_diff_shows_what_changes_and_nothing_else(tmp_path: Path) -> None:
    text = diff(tmp_path, {"a": "1\n2\n", "b": "same\n"}, {"a": "1\n3\n", "b": "same\n", "c": "new"})
    assert "-2\n+3\n" in text
    assert "--- /dev/null" in text
    assert "+new\n\\ No newline at end of file\n" in text
    assert "same" not in text
    assert diff(tmp_path, {"a": "1\n"}, {"a": "1\n"}) == ""
