"""The tool that makes the quickstart's data out of the standard library."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatune.data.formats import parse

TOOL = Path(__file__).parents[2] / "tools" / "make_docstring_data.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docstring_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docstring_data"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


SOURCE = '''
"""A module."""

def plain(x):
    """Return x twice, as a pair."""

    # Why not.
    return x, x


def only_a_docstring(x):
    """Do nothing with x at all."""


class Thing:
    """No function."""

    @property
    def name(self):
        """The name of this thing."""
        return self._name

    def cannot_be_dedented(self):
        """A text inside begins at the margin."""
        return """a
text"""

    async def wait(self):
        \'\'\'Wait for it to come.

        It comes in the end, and this paragraph says so at such a length that the whole docstring is longer than
        what is taken as it stands, so that the first paragraph alone has to do.
        \'\'\'
        await self


def one_line(): "Answer with a docstring beside it."; return 1


def undocumented(x):
    return x


def too_short():
    """Short."""


def a_doctest():
    """>>> a_doctest() and more words here"""


if True:
    def conditional(x):
        """Documented in a branch only."""
        def inner():
            """Not taken by itself."""
        return inner
'''


def test_pairs_of_a_module(tool: ModuleType) -> None:
    pairs = {pair.name: pair for pair in tool.pairs_of("pkg.mod", SOURCE)}
    assert list(pairs) == ["plain", "only_a_docstring", "Thing.name", "Thing.wait", "conditional"]
    assert pairs["plain"].answer == "Return x twice, as a pair."
    assert pairs["plain"].code == "def plain(x):\n    # Why not.\n    return x, x"
    assert pairs["only_a_docstring"].code == "def only_a_docstring(x):\n    pass"
    assert pairs["Thing.name"].code == "@property\ndef name(self):\n    return self._name"
    assert pairs["Thing.wait"].answer == "Wait for it to come."
    assert "Not taken by itself" in pairs["conditional"].code
    for pair in pairs.values():
        (function,) = ast.parse(pair.code).body
        assert ast.get_docstring(function) is None and pair.answer not in pair.code


def test_choosing_prefers_short_ones_and_drops_copies(tool: ModuleType) -> None:
    def pair(name: str, size: int, answer: str | None = None) -> object:
        return tool.Pair("m", name, "c" * (size - 10) + name, answer or f"Answer {name}")

    found = [pair("a", 90), pair("b", 30), pair("c", 60), pair("d", 40, "answer B."), pair("e", 300)]
    assert [p.name for p in tool.choose(found, 2, 100)] == ["b", "c"]
    assert [p.name for p in tool.choose(found, 9, 100)] == ["a", "b", "c"]
    assert [p.name for p in tool.choose(found, 9, 1000)] == ["a", "b", "c", "e"]


def test_split_keeps_modules_whole_and_does_not_depend_on_order(tool: ModuleType) -> None:
    pairs = [tool.Pair(f"m{i % 17}.sub{i}", "f", f"code {i}", f"answer {i}") for i in range(170)]
    train, held_out = tool.split(pairs, 0.2)
    assert len(held_out) == 30 and len(train) == 140
    assert not {pair.group for pair in train} & {pair.group for pair in held_out}
    again = tool.split(pairs[::-1], 0.2)[1]
    assert set(again) == set(held_out)
    twins = [
        tool.Pair(name, "f", "c", "a").group
        for name in ("decimal", "_pydecimal", "_decimal", "email.message")
    ]
    assert twins == ["decimal", "decimal", "decimal", "email"]


def test_the_standard_library(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path / "a")]) == 0
    train, held_out = rows(tmp_path / "a" / "train.jsonl"), rows(tmp_path / "a" / "eval.jsonl")
    total = len(train) + len(held_out)
    assert 3000 < total <= 5000 and 0.01 < len(held_out) / total < 0.03
    groups = [{row["source"].split(":")[0].split(".")[0] for row in part} for part in (train, held_out)]
    assert not groups[0] & groups[1] and len(groups[1]) > 3
    assert not any(name in groups[0] | groups[1] for name in ("test", "site-packages", "lib2to3"))
    answers = [parse(row, "messages").messages[1]["content"] for row in train + held_out]
    assert len({answer.lower() for answer in answers}) == total
    assert all(len(row["messages"][0]["content"]) + len(row["messages"][1]["content"]) < 560 for row in train)
    readme = (tmp_path / "a" / "README.md").read_text()
    assert f"| train.jsonl | {len(train)} |" in readme and "Python Software Foundation License" in readme
    assert f"{len(train)} training and {len(held_out)} held-out pairs" in capsys.readouterr().out


def test_the_same_files_again(tool: ModuleType, tmp_path: Path) -> None:
    library = tmp_path / "library"
    (library / "pkg" / "tests").mkdir(parents=True)
    (library / "pkg" / "__init__.py").write_text(SOURCE)
    (library / "pkg" / "tests" / "skipped.py").write_text(SOURCE.replace("plain", "in_a_test"))
    (library / "other.py").write_text('def f():\n    """Say that it is here."""\n    return 1\n')
    (library / "broken.py").write_text("def f(:\n")
    (library / "latin.py").write_bytes(b"# \xff\n")
    arguments = ["--library", str(library), "--held-out", "0.2"]
    for name in ("a", "b"):
        assert tool.main([str(tmp_path / name), *arguments]) == 0
    for name in ("train.jsonl", "eval.jsonl", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    sources = [
        row["source"] for row in rows(tmp_path / "a" / "train.jsonl") + rows(tmp_path / "a" / "eval.jsonl")
    ]
    assert (
        "pkg:Thing.wait" in sources and "other:f" in sources and not any("test" in name for name in sources)
    )


def test_nothing_to_take(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert tool.main([str(tmp_path / "out"), "--library", str(tmp_path / "empty")]) == 2
    assert "no functions with docstrings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "out"), "--held-out", "1.5"])
