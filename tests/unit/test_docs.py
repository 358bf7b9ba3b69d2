"""What the documents say is true: links, paths, commands, configurations, example rows, figures."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from megatune.cli import commands
from megatune.config import describe, load_config
from megatune.config.schema import Config
from megatune.config.yaml_reader import read_yaml
from megatune.data.formats import detect, parse
from tests.unit.test_architecture import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# What a configuration cannot do without; a piece of one is put on top of it.
NEEDED = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "checkpoint": {"folder": "runs/x"}}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SCRIPTS = {
    "torchrun.sh": 0,
    "slurm.sbatch": 0,
    "mpirun.sh": 1,
}  # script -> arguments before the configuration
FILES = (".py", ".json", ".yaml", ".md")
SECTIONS = set(describe.properties(describe.schema()))
TOP = ("megatune", "configs", "launch", "tools", "docs", "tests", "benchmarks", "csrc")


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text("utf-8")) if found == language]


def all_blocks(language: str) -> Iterator[tuple[str, str]]:
    for page, name in zip(PAGES, NAMES, strict=True):
        yield from ((name, body) for body in blocks(page, language))


def code_spans(page: Path) -> list[str]:
    """What stands between backticks in running text, on one line."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each command line in a block, and of each span that is one (a verb alone is a name)."""
    for name, body in all_blocks("bash"):
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield name, words
    for page, name in zip(PAGES, NAMES, strict=True):
        for span in code_spans(page):
            words = span.split()
            is_ours = re.match(r"([A-Z_]+=\S+ )*(\S*/)?megatune ", span) and len(words) > 2
            if (is_ours and not _is_name(words[1:])) or words[0] == "make":
                yield name, shlex.split(span)


def _is_name(words: list[str]) -> bool:
    """Whether the words name a verb, of a group or not, and say nothing more."""
    group: click.Command = commands
    for word in words:
        if not isinstance(group, click.Group) or word not in group.commands:
            return False
        group = group.commands[word]
    return True


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    page = ROOT / name
    text = FENCE.sub("", page.read_text("utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in {slug(h) for h in re.findall(r"^#+ (.+)$", file.read_text(), re.M)}:
            broken.append(f"{target} (no such heading)")
    assert not broken, f"{name}: {broken}"


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_the_text_exist(name: str) -> None:
    """A span such as `megatune/ops/norm.py` or `configs/models/*` names something in the repository."""
    wrong = []
    for span in code_spans(ROOT / name):
        if re.fullmatch(rf"({'|'.join(TOP)})/[\w./*-]*", span) and not list(ROOT.glob(span.rstrip("/"))):
            wrong.append(span)
    assert not wrong, f"{name}: {wrong}"


def _verbs(group: click.Group, words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that the words name, and what is left of them; None where there is no such verb."""
    if not words or words[0] not in group.commands:
        return None
    command = group.commands[words[0]]
    return _verbs(command, words[1:]) if isinstance(command, click.Group) else (command, words[1:])


def _our_command(words: list[str]) -> list[str] | None:
    """What follows `megatune` in a command line, or one of our scripts that call it; None in a line without one."""
    for at, word in enumerate(words):
        script = word.rpartition("/")[2]
        if script in SCRIPTS:
            return ["train", *words[at + 1 + SCRIPTS[script] :]]
        if script == "megatune":
            return words[at + 1 :]
    return None


def test_commands_of_the_documents_exist_and_parse() -> None:
    seen = set()
    for name, words in shell_lines():
        found = _our_command(words)
        if found is None or "KEY=VALUE" in found:
            continue
        command = _verbs(commands, found)
        assert command is not None, f"{name}: {' '.join(words)}: no such verb"
        verb, arguments = command
        seen.add(verb.name)
        try:
            context = verb.make_context(verb.name, list(arguments))
        except click.UsageError as error:
            raise AssertionError(f"{name}: {' '.join(words)}: {error.format_message()}") from error
        for key in (override.partition("=")[0] for override in context.params.get("overrides", ())):
            assert key in set(describe.all_keys()), f"{name}: {' '.join(words)}: no key {key}"
        config = context.params.get("config") or ""
        if config.startswith("configs/"):
            load_config(ROOT / config, context.params["overrides"])
    assert seen >= {"train", "chat", "generate", "show", "env"}


@pytest.mark.parametrize("name", NAMES)
def test_verbs_exist(name: str) -> None:
    """`megatune VERB` is one, but in the table of what is not there yet."""
    text = re.sub(r"^\|.*\|$", "", (ROOT / name).read_text("utf-8"), flags=re.M)
    verbs = set(re.findall(r"(?:`|/|^)megatune ([a-z]+)", text, re.M))
    assert verbs <= commands.commands.keys()
    assert verbs or name != "README.md"


def test_makes_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    used = {(name, words[1]) for name, words in shell_lines() if words[0] == "make"}
    assert len(used) >= 6
    assert not {use for use in used if use[1] not in targets}


@pytest.mark.parametrize(("name", "text"), list(all_blocks("yaml")))
def test_configurations_load(name: str, text: str) -> None:
    """A whole configuration loads; a piece of one does on top of what every configuration needs."""
    tree, _ = read_yaml(text, name)
    assert isinstance(tree, dict)
    merged: dict[str, Any] = {key: dict(value) for key, value in NEEDED.items()}
    for section, value in tree.items():
        merged[section] = {**merged.get(section, {}), **value}
    Config.model_validate(merged)


def test_the_whole_configuration_of_the_readme_loads_from_its_file(tmp_path: Path) -> None:
    whole = [
        text for text in blocks(ROOT / "README.md", "yaml") if NEEDED.keys() <= yaml.safe_load(text).keys()
    ]
    assert whole
    for text in whole:
        (tmp_path / "mine.yaml").write_text(text)
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_functions_in_the_text_exist(name: str) -> None:
    """Spans such as `train.compile: true` name keys of the schema, those such as `models.build` our functions."""
    known = set(describe.all_keys()) | {"method.type"}
    wrong = []
    for span in code_spans(ROOT / name):
        key = re.match(r"(?:megatune\.)?(([a-z_]+)(?:\.\w+)+)(?=$|:|=|\()", span)
        if key is None or key[2] not in FLOORS.keys() | SECTIONS or span.endswith(FILES) or key[1] in known:
            continue
        try:
            pkgutil.resolve_name(f"megatune.{key[1]}")
        except (ImportError, AttributeError):
            wrong.append(span)
    assert not wrong, f"{name}: {wrong}"


def test_the_way_of_the_data_is_that_of_the_code() -> None:
    (way,) = [body for body in blocks(ROOT / "docs/architecture.md", "") if body.startswith("train(config)")]
    source = "".join(path.read_text("utf-8") for path in (ROOT / "megatune/training").glob("*.py"))
    steps = [re.match(r"[\w.]+", line.strip())[0] for line in way.splitlines()]
    assert len(steps) > 20
    assert not [step for step in steps if not re.search(rf"\b{step.rpartition('.')[2]}\b", source)]


def test_example_rows_are_of_the_formats_they_show() -> None:
    rows = {name: [] for name in NAMES}
    for name, body in all_blocks("jsonl"):
        rows[name] += [json.loads(line) for line in body.splitlines()]
    every = {"messages", "sharegpt", "alpaca", "prompt_completion", "text"}
    for name in ("README.md", "docs/data.md"):
        assert {detect(row) for row in rows[name]} == every
    for row in (row for found in rows.values() for row in found):
        parse(row, detect(row))


def test_python_blocks_are_python() -> None:
    for name, body in all_blocks("python"):
        compile(body, name, "exec")


def test_figures_are_those_of_the_result_files() -> None:
    """Every result file that the README cites: its rates stand there, in thousands of tokens a second."""
    text = (ROOT / "README.md").read_text("utf-8")
    cited = set(re.findall(r"\]\((benchmarks/results/[\w.]+\.json)\)", text))
    assert cited
    for file in cited:
        result = json.loads((ROOT / file).read_text())
        assert result["device"].removeprefix("NVIDIA ").split(",")[0] in text, f"{file}: name the device"
        for row in result["rows"]:
            rate = row["tokens_per_second"]
            figure = f"{rate / 1000:.1f}k" if rate >= 10_000 else f"{rate:,.0f}"
            assert f"{figure} tokens/s" in text, f"{file}: {row['name']} reaches {figure} tokens/s"


def test_metrics_of_the_readme_are_those_that_are_written() -> None:
    (example,) = [body for body in blocks(ROOT / "README.md", "json") if '"step"' in body]
    source = (ROOT / "megatune/training/loop.py").read_text("utf-8")
    written = re.search(r"metrics = \{(.*?)\n            \}", source, re.S)
    assert written is not None
    assert set(json.loads(example)) == {"step", *re.findall(r'^ +"(\w+)":', written[1], re.M)}


def test_rooms_stand_on_the_floors_of_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    said = {
        name.removesuffix(".py").rstrip("/"): int(floor)
        for name, floor in re.findall(r"^\| `megatune/([\w./]+)` \| (\d) \|", text, re.M)
    }
    assert said == {room: floor for room, floor in FLOORS.items() if room != "__main__"}
