#!/usr/bin/env python3
"""Make an instruction set out of the running Python's own standard library: a function without its docstring -> the
docstring.

    python tools/make_docstring_data.py OUT_FOLDER [--pairs 5000] [--max-chars 480] [--held-out 0.02]

Writes train.jsonl, eval.jsonl (messages format) and README.md. Needs nothing but Python; the same Python version makes
the same files. The shortest functions are taken, so that a small model can be tuned on a CPU: up to 480 characters
there are about 4,000 of them, most below 130 tokens of SmolLM2; --max-chars 1000 gives the full 5,000. The held-out
part consists of whole top-level modules, so that near-copies within a package are on one side: in the order of a hash
of their names, each that still fits into the share.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import sys
import sysconfig
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Write the docstring of this Python function.\n\n"
SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "turtledemo",
        "pydoc_data",
    )
)
WHOLE_UP_TO = 160  # characters; of a longer docstring the first paragraph is the answer
SHORTEST_ANSWER = 15
LONGEST_ANSWER = 240

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """`code`: a function without its docstring; `answer`: the docstring; `module`, `name`: where it stands."""

    module: str
    name: str
    code: str
    answer: str

    @property
    def size(self) -> int:
        return len(self.code) + len(self.answer)

    @property
    def group(self) -> str:
        """Top-level module; a module and its Python twin (decimal, _pydecimal) are one."""
        return self.module.split(".")[0].removeprefix("_py").lstrip("_")

    def row(self) -> dict[str, object]:
        return {
            "messages": [
                {"role": "user", "content": INSTRUCTION + self.code},
                {"role": "assistant", "content": self.answer},
            ],
            "source": f"{self.module}:{self.name}",
        }


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module under `root`, sorted; tests and bundled packages left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def pairs_of(module: str, source: str) -> Iterator[Pair]:
    """All pairs of one module's source, in order. SyntaxError where it is no Python."""
    lines = source.splitlines(keepends=True)
    for name, node in functions(ast.parse(source), ""):
        docstring = ast.get_docstring(node)
        answer = tidy(docstring) if docstring else None
        code = without_docstring(node, lines) if answer else None
        if answer and code:
            yield Pair(module, name, code, answer)


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """(qualified name, node) of the functions and methods of a module; those inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from functions(node, prefix)


def tidy(docstring: str) -> str | None:
    """The answer that is asked for, None where the docstring is no good one: too short, too long, or a doctest."""
    text = inspect.cleandoc(docstring)
    if len(text) > WHOLE_UP_TO or ">>>" in text:
        text = " ".join(text.split("\n\n")[0].split())
    good = SHORTEST_ANSWER <= len(text) <= LONGEST_ANSWER and len(text.split()) >= 3 and ">>>" not in text
    return text if good and text.replace("\n", "").isprintable() else None


def without_docstring(node: Function, lines: list[str]) -> str | None:
    """Source of a function without its docstring, dedented; None where that cannot be cut out cleanly."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    docstring = node.body[0]
    start, end = docstring.lineno - 1, docstring.end_lineno
    before = lines[start].encode()[: docstring.col_offset].decode()
    after = lines[end - 1].encode()[docstring.end_col_offset :].decode().strip()
    if before.strip() or (after and not after.startswith("#")):
        return None  # something else stands on its lines
    body = lines[end : node.end_lineno]
    while body and not body[0].strip():
        del body[0]
    if len(node.body) == 1:
        body.append(f"{before}pass\n")
    code = textwrap.dedent("".join(lines[first:start] + body)).rstrip()
    # Dedenting may have changed a text of several lines: only what still means the same is taken.
    expected = ast.Module(
        [type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:] or [ast.Pass()]})], []
    )
    try:
        same = ast.dump(ast.parse(code)) == ast.dump(expected)
    except SyntaxError:
        return None
    return code if same else None


def choose(found: list[Pair], count: int, max_chars: int) -> list[Pair]:
    """The `count` shortest pairs of at most `max_chars` characters, no code and no docstring twice; in their order in
    the library."""
    ordered = sorted(enumerate(found), key=lambda item: (item[1].size, item[0]))
    chosen: list[tuple[int, Pair]] = []
    seen: set[str] = set()
    for number, pair in ordered:
        keys = {"code " + " ".join(pair.code.split()), "answer " + pair.answer.lower().rstrip(".")}
        if pair.size <= max_chars and not keys & seen and len(chosen) < count:
            seen |= keys
            chosen.append((number, pair))
    return [pair for _, pair in sorted(chosen, key=lambda item: item[0])]


def split(pairs: list[Pair], held_out: float) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): whole groups in the order of their hash, each that still fits into the share."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    room = round(held_out * len(pairs))
    chosen: set[str] = set()
    for name in sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(groups[name]) <= room:
            chosen.add(name)
            room -= len(groups[name])
    train = [pair for pair in pairs if pair.group not in chosen]
    return train, [pair for pair in pairs if pair.group in chosen]


def write(folder: Path, train: list[Pair], held_out: list[Pair], candidates: int, command: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # train.jsonl last and in one piece: where it is, all is there.
    for name, pairs in (("eval.jsonl", held_out), ("train.jsonl", train)):
        text = "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs)
        unfinished = folder / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    everything = train + held_out
    sizes = sorted(pair.size for pair in everything)
    (folder / "README.md").write_text(
        f"""# Docstrings of the Python standard library

Made from the standard library of Python {platform.python_version()} by

    {command}

Each row asks for the docstring of a function and answers with it (the first paragraph where it is long). These are the
{len(everything)} shortest of {candidates} functions with a docstring; no code and no docstring occurs twice.

| file | pairs | top-level modules |
|---|---|---|
| train.jsonl | {len(train)} | {len({pair.group for pair in train})} |
| eval.jsonl | {len(held_out)} | {len({pair.group for pair in held_out})} |

No top-level module is in both files. Code and docstring together have {sizes[0]} to {sizes[-1]} characters
(median {sizes[len(sizes) // 2]}).

Licence of the texts: Python Software Foundation License Version 2, copyright Python Software Foundation; see
https://docs.python.org/3/license.html.
""",
        encoding="utf-8",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl, eval.jsonl and README.md are written")
    parser.add_argument("--pairs", type=int, default=5000, help="pairs in all (default 5000)")
    parser.add_argument(
        "--max-chars", type=int, default=480, help="of code and docstring together (default 480)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.02, help="share of the pairs for eval.jsonl (default 0.02)"
    )
    parser.add_argument("--library", type=Path, default=None, help="another folder of Python modules")
    options = parser.parse_args(arguments)
    if options.pairs < 2 or not 0 <= options.held_out < 1:
        parser.error("--pairs must be at least 2, --held-out in [0, 1)")
    began = time.perf_counter()
    root = options.library or Path(sysconfig.get_paths()["stdlib"])
    found: list[Pair] = []
    unreadable = 0
    for module, path in modules(root):
        try:
            found += pairs_of(module, path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            unreadable += 1  # templates and samples of bad code that some libraries carry
    pairs = choose(found, options.pairs, options.max_chars)
    if len(pairs) < 2:
        print(f"no functions with docstrings in {root}: is the library there as source?", file=sys.stderr)
        return 2
    train, held_out = split(pairs, options.held_out)
    command = f"make_docstring_data.py --pairs {options.pairs} --max-chars {options.max_chars}"
    write(options.folder, train, held_out, len(found), f"{command} --held-out {options.held_out}")
    print(
        f"{options.folder}: {len(train)} training and {len(held_out)} held-out pairs from {root} "
        f"({len(found)} candidates, {unreadable} files unreadable, {time.perf_counter() - began:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
