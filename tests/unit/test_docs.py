"""The documentation is true as far as a program can tell: links, commands, examples, metrics."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from delta_sync.applying import SinkNumbers
from delta_sync.dumps import Dump
from delta_sync.events import HandlerNumbers
from delta_sync.measures import LookupNumbers, PartitionLag
from delta_sync.observe import ProgressCollector
from delta_sync.pipeline import Pipeline
from delta_sync.progress import LogPosition, Progress
from delta_sync.sinks import sink_class
from delta_sync.spec import spec_from
from delta_sync.testing.harness import Harness
from delta_sync.verifying import Verified
from deltactl.app import App
from deltactl.main import main

REPOSITORY = Path(__file__).parents[2]
SOURCE_ROOTS = ("processors", "cli", "schemas", "debezium-config", "examples", "tests")
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(page for folder in ("docs", "examples") for page in (REPOSITORY / folder).rglob("*.md")),
    ]
)
LEAST: dict[str, Any] = {  # of a specification
    "name": "movies",
    "source": {"url": "postgresql://delta@db/studio"},
    "tables": {"public.movie": {}},
    "sinks": {"cache": {"url": "redis://cache/0"}},
}
PROMISES = {"roadmap.md"}  # names commands that are to come

FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}: {self.text[:40]!r}"


def blocks(*kinds: str) -> list[Block]:
    return [
        Block(page, match["kind"], match["text"])
        for page in PAGES
        for match in FENCE.finditer(page.read_text())
        if match["kind"] in kinds
    ]


def id_of(value: object) -> str:
    return str(value)


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_pages_that_the_code_names_exist() -> None:
    named = {
        (path, name)
        for root in SOURCE_ROOTS
        for path in (REPOSITORY / root).rglob("*.py")
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
    }
    assert named
    assert not [(str(path), name) for path, name in named if not (REPOSITORY / name).exists()]


def test_every_page_is_reached_from_the_index() -> None:
    index = REPOSITORY / "docs" / "index.md"
    reached = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert set((REPOSITORY / "docs").rglob("*.md")) - {index} <= reached


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> Iterator[tuple[str, str]]:
    """Yield every `deltactl …` with its page."""
    for page in PAGES:
        if page.name in PROMISES or page.parent.name == "reference":  # the latter is made from the commands
            continue
        text = page.read_text()
        found = [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]
        for block in blocks("sh", "console"):
            if block.page == page:
                lines = block.text.replace("\\\n", " ").splitlines()
                found += [line.removeprefix("$ ") for line in lines if block.kind == "sh" or line.startswith("$ ")]
        for code in found:
            for start in re.finditer(r"(?<![\w/`.-])deltactl (?=\w)", code):
                command = re.split(r"\s+(?:2?>|\||&|#|;)|\)", code[start.start() :])[0]
                yield str(page.relative_to(REPOSITORY)), command


COMMANDS = sorted(set(commands()))


def test_there_are_commands_in_the_documentation() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=[text for _, text in COMMANDS])
def test_commands_exist_with_their_options(page: str, text: str) -> None:
    words = shlex.split(text)[1:]
    command: click.Command = main
    context = click.Context(main, info_name="deltactl", obj=App())
    while isinstance(command, click.Group) and words and words[0] != "…":
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{page}: there is no `{name}` in `{text}`"
        command = found
        context = click.Context(command, info_name=name, parent=context)
    if isinstance(command, click.Group):
        assert words in ([], ["…"]), f"{page}: `{text}` names no command"
        return
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in known]
    assert not unknown, f"{page}: {unknown} in `{text}`"
    if "…" not in text and words:
        command.make_context(command.name, list(words), parent=context.parent)  # raises what typing it would


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", blocks("python"), ids=id_of)
def test_python_compiles_and_processors_declare_what_they_should(block: Block) -> None:
    code = compile(block.text, str(block.page), "exec")
    if "Pipeline(" in block.text:
        module: dict[str, Any] = {"__name__": "example"}
        exec(code, module)
        (pipeline,) = [value for value in module.values() if isinstance(value, Pipeline)]
        assert pipeline.tables


TESTS = [block for block in blocks("python") if "SinkContract" in block.text or "Harness(" in block.text]


def pipeline_folder(path: Path, processor: str) -> Path:
    """Make the folder of pipeline movies, as pages take it to be there."""
    folder = path / "pipelines" / "movies"
    folder.mkdir(parents=True)
    (folder / "processor.py").write_text(processor)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(LEAST))
    return folder


def processor_of(page: Path) -> str:
    """Return the processor that a page's tests are for: the README's own, else the demo's."""
    if page.name == "README.md":
        (processor,) = [block.text for block in blocks("python") if block.page == page and "Pipeline(" in block.text]
        return processor
    return (REPOSITORY / "examples" / "demo" / "processor.py").read_text()


def test_there_are_tests_in_the_documentation() -> None:
    assert len(TESTS) == 4


@pytest.mark.parametrize("block", TESTS, ids=id_of)
def test_tests_in_the_documentation_pass(block: Block, tmp_path: Path) -> None:
    pipeline_folder(tmp_path, processor_of(block.page))
    (tmp_path / "test_it.py").write_text(block.text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def test_what_stir_says_in_the_documentation_is_what_it_says(tmp_path: Path) -> None:
    page = REPOSITORY / "docs" / "howto" / "test-a-processor.md"
    (processor,) = [block.text for block in blocks("python") if block.page == page and "Pipeline(" in block.text]
    (message,) = [block.text for block in blocks("text") if block.page == page]
    movies = Harness(pipeline_folder(tmp_path, processor))
    movies.insert("public.movie", id=1, title="Casablanca")
    assert movies.documents("cache") == {"1": {"title": "Casablanca", "changes": 1}}
    with pytest.raises(AssertionError) as caught:
        movies.stir()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("block", blocks("yaml"), ids=id_of)
def test_yaml_is_a_specification(block: Block) -> None:
    spec = spec_from({**LEAST, **yaml.safe_load(block.text)}, str(block.page))
    for name, sink in spec.sinks.items():
        cls = sink_class(name, sink.url)
        cls.options_model.model_validate(sink.options)
        for table in spec.tables.values():
            cls.target_model.model_validate(table.sinks.get(name, {}))


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    progress = Progress(LogPosition(time.monotonic), time.monotonic)
    progress.sinks = {"cache": SinkNumbers()}
    progress.lookups = {"ratings": LookupNumbers()}
    progress.handlers = {"notify": HandlerNumbers()}
    progress.loads = {"public.movie": {"state": "running", "rows": 1}}
    progress.insert_lsn = 3
    progress.position.sent(2)
    progress.position.advance(1)
    progress.partition_lags = {("delta_movies.public.movie", 0): PartitionLag(3, 0.5)}
    progress.dumps = [Dump(table="public.movie", kind="table")]
    progress.notices = {("http", "accepted"): 1}
    progress.enrichment_ages_s = {"public.movie": 1.0}
    progress.note_verified({"public.movie": Verified("public.movie", 5.0)})
    rows: list[str] = []
    for metric in ProgressCollector("movies", progress).collect():
        assert metric.samples, metric.name
        labels = ", ".join(f"`{label}`" for label in metric.samples[0].labels if label != "le")
        name = metric.name if metric.type == "histogram" else metric.samples[0].name
        rows.append(f"| `{name}` | {labels} | {metric.documentation} |")
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `delta_")]
    assert table == rows, "write this into docs/operations.md:\n" + "\n".join(rows)
