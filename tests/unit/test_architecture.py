"""The house's rules: imports point down, modules and functions stay readable, nothing unsafe, a quick start."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatune"

FLOORS = {
    "errors": 0,
    "config": 0,
    "ops": 1,
    "parallel": 2,
    "models": 3,
    "optim": 3,
    "track": 4,
    "checkpoint": 4,
    "data": 4,
    "adapters": 4,
    "training": 5,
    "plan": 5,
    "launch": 6,
    "serve": 6,
    "cli": 7,
    "cli_slurm": 7,
    "cli_convert": 7,
    "cli_checkpoint": 7,
    "__main__": 8,
}
# Rooms on one floor do not know each other, except here: (who imports, what).
NEIGHBOURS = {("config", "errors"), ("checkpoint", "adapters"), ("plan", "training")}
NEIGHBOURS |= {("cli", "cli_slurm"), ("cli", "cli_convert"), ("cli", "cli_checkpoint")}
MODULE_LINES = 600
FUNCTION_LINES = 80
FAMILY_LINES = 150
NOT_FAMILIES = {"__init__.py", "base.py", "rope_config.py"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name of what is imported), those inside functions included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms <= FLOORS.keys(), f"say on which floor {sorted(rooms - FLOORS.keys())} stands"


def test_imports_point_down() -> None:
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "megatune" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == room:
                continue
            below = room == "__init__" and parts[1] == "errors"
            if not below and room != "__init__":
                below = FLOORS[parts[1]] < FLOORS[room] or (room, parts[1]) in NEIGHBOURS
            if not below:
                wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["megatune", "tests", "tools", "benchmarks"])
def test_modules_and_functions_are_short(folder: str) -> None:
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text("utf-8").splitlines())
        is_family = path.parent.name == "families" and path.name not in NOT_FAMILIES
        limit = FAMILY_LINES if is_family else MODULE_LINES
        if lines > limit:
            long.append(f"{name_of(path)} has {lines} lines (at most {limit})")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    long.append(f"{name_of(path)}:{node.lineno} {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_no_file_is_executed_and_no_error_swallowed() -> None:
    wrong = []
    for path in MODULES:
        wrong += [
            f"{name_of(path)}:{line} imports {name}"
            for line, name in imports(path)
            if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")
        ]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call | ast.ExceptHandler | ast.Raise):
                problem = _problem(node)
                if problem:
                    wrong.append(f"{name_of(path)}:{node.lineno} {problem}")
    assert not wrong, "\n".join(wrong)


def _problem(node: ast.Call | ast.ExceptHandler | ast.Raise) -> str | None:
    text = ast.unparse(node)
    if isinstance(node, ast.Raise):
        return "raises NotImplementedError" if "NotImplementedError" in text else None
    if isinstance(node, ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type else ""
        only_passes = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
        return (
            "swallows every error" if only_passes and caught in ("", "Exception", "BaseException") else None
        )
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
        return f"calls {called}"
    if called == "torch.load" and "weights_only=True" not in text:
        return "calls torch.load without weights_only=True"
    if called.endswith(("Environment", "Template")) and "Sandbox" not in called and "jinja" in text.lower():
        return f"makes a {called} outside the sandbox"
    return None


def test_transformers_is_never_imported_with_a_module() -> None:
    wrong = []
    for path in MODULES:
        for node in tree_of(path).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] in ("transformers", "peft", "matplotlib") for name in names):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, f"import these inside the function that needs them: {wrong}"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import megatune", ["torch", "pydantic", "yaml", "rich", "numpy"]),
        ("import megatune.cli", ["torch", "pydantic", "numpy", "transformers"]),
        ("import megatune; megatune.load_config", ["torch", "transformers", "numpy"]),
        # What every rank loads: torch's compiler and FSDP would double the time.
        (
            "import megatune.training.run",
            ["torch._dynamo", "torch.distributed.fsdp", "transformers", "sympy"],
        ),
    ],
)
def test_importing_is_light(statement: str, heavy: list[str]) -> None:
    code = f"import sys; {statement}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr or f"imported {done.stdout}"


def test_help_comes_at_once() -> None:
    # Processor time, not the clock: other tests run beside this one.
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'megatune', '--help'], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "assert done.returncode == 0 and 'Usage: megatune' in done.stdout, done.stderr\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=60
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.5, f"megatune --help took {seconds} s of processor time"
