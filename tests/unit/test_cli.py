"""The command line as a whole: reference, help, schema, completion, and how errors end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from delta_sync.errors import UsageError
from delta_sync.secrets import remember
from delta_sync.sinks import installed
from deltactl.app import App, DeltaGroup, dir_option, key_texts
from deltactl.main import main
from deltactl.reference import PAGE
from deltactl.schema import schema

ROOT = Path(__file__).parents[2]


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from commands(child, (*path, name))
    else:
        yield path, command


COMMANDS = list(commands(main))


def test_the_reference_is_up_to_date() -> None:
    # In a process of its own: click keeps the help option that a command was first asked for, here by any other test.
    made = subprocess.run([sys.executable, "-m", "deltactl.reference"], capture_output=True, text=True, check=True)
    assert (ROOT / PAGE).read_text(encoding="utf-8") == made.stdout, f"type: python -m deltactl.reference > {PAGE}"


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_every_command_has_help_with_an_example_and_json(path: tuple[str, ...], command: click.Command) -> None:
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0
    assert f"deltactl {' '.join(path)} " in result.output.partition("Example")[2] or path == ("pipeline", "list")
    assert {"--json", "--dir", "--debug"} <= {option for parameter in command.params for option in parameter.opts}
    assert not result.output.partition("\n\n")[2].startswith("Options"), "it says what it does"


def groups(command: click.Command) -> Iterator[DeltaGroup]:
    if isinstance(command, DeltaGroup):
        yield command
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None, name
            yield from groups(child)


def test_help_of_a_group_says_of_its_commands_what_they_say() -> None:
    """A group prints it beside their names, and imports none of them for it."""
    beside = [(name, later.short_help) for group in groups(main) for name, later in group.later.items()]
    own = [
        (name, command.get_short_help_str(1000))
        for group in groups(main)
        for name in group.later
        if (command := group.get_command(click.Context(group), name)) is not None
    ]
    assert len(beside) > 10
    assert beside == own


HEAVY = {
    "alembic", "fastavro", "filelock", "kafka", "prometheus_client", "psycopg", "pydantic", "pymongo", "redis",
    "requests", "rich", "sqlalchemy", "structlog", "yaml",
}  # fmt: skip
COMMAND_THEN_MODULES = """
import atexit, sys
atexit.register(lambda: print("\\n", *{{name.partition(".")[0] for name in sys.modules}}))
sys.argv[1:] = {arguments}
from deltactl.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set[str]()),
        (["--version"], set[str]()),
        (["completion", "bash"], set[str]()),
        (["status", "nope"], {"fastavro", "pydantic", "sqlalchemy", "yaml"}),
        (["dead", "list", "nope"], {"fastavro", "pydantic", "sqlalchemy", "yaml"}),
        (["dump", "start", "nope"], {"fastavro", "pydantic", "sqlalchemy", "yaml"}),
    ],
)
def test_a_start_imports_no_more_than_it_needs(arguments: list[str], needed: set[str], tmp_path: Path) -> None:
    """A start is all that a short command costs, and each of these libraries takes as long as Python itself."""
    code = COMMAND_THEN_MODULES.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    imported = set(done.stdout.splitlines()[-1].split())
    assert {"click", "deltactl"} <= imported, done.stderr
    assert imported & HEAVY == needed


def test_errors_end_as_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    remember("hunter2-secret")

    def fail(_app: App) -> list[str]:
        raise RuntimeError("could not use hunter2-secret")

    monkeypatch.setattr(App, "names", fail)
    short = CliRunner().invoke(main, ["pipeline", "list"])
    assert short.exit_code == 1
    assert short.stderr.count("\n") == 1
    assert "RuntimeError: could not use ***." in short.stderr
    long = CliRunner().invoke(main, ["pipeline", "list", "--debug"])
    assert "Traceback" in long.stderr
    assert "hunter2-secret" not in short.output + long.output


def test_keys_are_taken_from_an_argument_or_from_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeff17\r\n\n blanks \na,b\nline\u2028separator\n".encode())
    assert key_texts(None, file) == ["17", " blanks ", "a,b", "line\u2028separator"]
    assert key_texts("17, 21,,x y", None) == ["17", "21", "x y"]
    for given, said in (("", "names no key"), (" , ", "names no key"), ("a\udcff", "no text in UTF-8")):
        with pytest.raises(UsageError, match=f"--keys .*{said}"):
            key_texts(given, None)
    for content, said in ((b"\n \n", "names no key"), (b"\xff", "no text in UTF-8")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"--keys-file.*{said}"):
            key_texts(None, file)
    with pytest.raises(UsageError, match="cannot be read"):
        key_texts(None, tmp_path / "nothing")


@pytest.mark.parametrize("options", [["--keys", ""], ["--where", " "], ["--keys-file", ""], ["--timeout", "nan"]])
def test_a_dump_of_nothing_is_none_of_everything(tmp_path: Path, options: list[str]) -> None:
    """A variable of a script may be empty."""
    (tmp_path / "movies").mkdir()
    (tmp_path / "movies" / "pipeline.yaml").write_text(
        "{name: movies, source: {url: postgresql://delta@db/studio}, tables: {public.movie: {shape: {}}},"
        " sinks: {cache: {url: redis://cache/0}}}"
    )
    starting = ["dump", "start", "movies", "--table", "public.movie", "--dir", str(tmp_path)]
    started = CliRunner().invoke(main, [*starting, *options])
    assert started.exit_code == 2
    assert options[0] in started.stderr


def test_usage_errors_as_json() -> None:
    result = CliRunner().invoke(main, ["pipeline", "show", "--json"])
    assert result.exit_code == 2
    assert "NAME" in json.loads(result.stderr)["error"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]) -> None:
    def interrupt(_app: App) -> list[str]:
        raise interruption

    monkeypatch.setattr(App, "names", interrupt)
    result = CliRunner().invoke(main, ["pipeline", "list"])
    assert result.exit_code == 130
    assert result.output.strip() == ""


INTERRUPTED_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["pipeline", "list"]
from deltactl.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["click", "delta_sync.errors", "deltactl.app", "delta_sync.spec", "deltactl.pipeline"]
)
def test_ctrl_c_is_quiet_while_modules_are_imported(module: str) -> None:
    """As the console script begins; the last of the modules is one of a command's own."""
    code = INTERRUPTED_IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m deltactl.main pipeline schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "{"


def test_the_schema_knows_each_sinks_options() -> None:
    found = schema(installed())
    rules = {rule["then"]["title"]: rule for rule in found["definitions"]["SinkSpec"]["allOf"]}
    for kind, cls in installed().classes.items():
        rule = rules[f"Sink {kind}"]
        assert set(rule["then"]["properties"]) == {"url", *cls.options_model.model_fields}
        assert all(scheme in rule["if"]["properties"]["url"]["pattern"].replace("\\", "") for scheme in cls.schemes)

    def references(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "$ref":
                    yield str(item)
                else:
                    yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    assert {ref.removeprefix("#/definitions/") for ref in references(found)} <= set(found["definitions"])
    assert json.loads(CliRunner().invoke(main, ["pipeline", "schema"]).stdout) == found


def test_the_schema_takes_no_secret_in_plain_text() -> None:
    found = schema(installed())
    definitions = found["definitions"]
    rules = {rule["then"]["title"]: rule["then"] for rule in definitions["SinkSpec"]["allOf"]}
    for properties, name in (
        (definitions["SourceSpec"]["properties"], "password"),
        (definitions["SecuritySpec"]["properties"], "password"),
        (definitions["RegistrySpec"]["properties"], "token"),
        (rules["Sink search"]["properties"], "api_key"),
        (rules["Sink mongodb"]["properties"], "password"),
    ):
        pattern = re.compile(properties[name]["pattern"])
        assert pattern.search("${env:PW}")
        assert pattern.search("${file:/run/pw}${env:B}")
        assert not pattern.search("secret")
        assert not pattern.search("sec${env:PW}")
    assert "pattern" not in rules["Sink search"]["properties"]["ca_file"]


@pytest.mark.parametrize(("names", "words"), [(["a"], "there is a."), (["a", "b"], "there are a, b.")])
def test_the_pipelines_that_exist_are_named(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.yaml").touch()
    assert words in CliRunner().invoke(main, ["pipeline", "show", "nope", "--dir", str(tmp_path)]).stderr


def test_the_next_command_finds_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTA_PIPELINES", raising=False)
    assert dir_option(App()) == ""
    assert dir_option(App(folder=tmp_path)) == f" --dir {tmp_path}"


@pytest.fixture
def pipelines(tmp_path: Path) -> Path:
    """A folder with two pipelines, and something else."""
    for name in ("movies", "music", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.yaml").touch()
    (tmp_path / "movie_notes").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["status"], ["pipeline", "show"], ["pipeline", "delete"], ["dead", "list"], ["run"]]
)
def test_names_of_pipelines_are_completed(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("DELTA_PIPELINES", str(pipelines))
    found = ShellComplete(main, {}, "deltactl", "_DELTACTL_COMPLETE").get_completions(arguments, "m")
    assert [item.value for item in found] == ["movies", "music"]


def test_names_are_completed_in_the_folder_of_the_option(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELTA_PIPELINES", str(tmp_path / "nowhere"))
    complete = ShellComplete(main, {}, "deltactl", "_DELTACTL_COMPLETE").get_completions
    for arguments in (["status", "--dir", str(pipelines)], ["--dir", str(pipelines), "status"]):
        assert [item.value for item in complete(arguments, "mu")] == ["music"]
    assert complete(["status"], "m") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_DELTACTL_COMPLETE" in result.stdout
    found = json.loads(CliRunner().invoke(main, ["completion", shell, "--json"]).stdout)
    assert (found["shell"], found["script"] + "\n") == (shell, result.stdout)


def test_bash_completes_with_the_script(pipelines: Path) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    binary = Path(sys.executable).parent / "deltactl"
    commands_ = f"{script}\nCOMP_WORDS=(deltactl status m); COMP_CWORD=2\n_deltactl_completion {binary}\n"
    done = subprocess.run(
        ["bash", "-c", commands_ + 'echo "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        env={**os.environ, "DELTA_PIPELINES": str(pipelines)},
    )
    assert done.stdout.split() == ["movies", "music"], done.stderr
