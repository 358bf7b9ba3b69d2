"""kill -9 at every file operation of a save: the next start finds a whole checkpoint, old or new.

This file is also the script that does it (`python test_store_crash.py FOLDER`): one process that has torch imported
forks a child for each crash point, and the child kills itself there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
OPERATIONS = (
    "make_folder",
    "create",
    "write",
    "sync",
    "close",
    "sync_folder",
    "forget_cached",
    "rename",
    "remove_file",
    "remove_tree",
)


def die_at(number: int, unsynced: Path) -> Callable[[], int]:
    """Kill this process at its n-th file operation, half-way through if it is a write or the removal of a folder.
    `unsynced` holds the names of files whose bytes a power cut could still lose. Returns a count of operations."""
    from megatune.checkpoint import files

    count = 0
    open_files: dict[int, str] = {}
    unsafe: set[str] = set()

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                if name == "remove_tree" and args[0].exists():
                    next(args[0].iterdir()).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args)
            if name == "create":
                open_files[result] = str(args[0])
                unsafe.add(str(args[0]))
            elif name == "sync":
                unsafe.discard(open_files[args[0]])
            elif name == "rename":
                moved = {p: p.replace(str(args[0]), str(args[1]), 1) for p in unsafe}
                unsafe.clear()
                unsafe.update(moved.values())
            unsynced.write_text("\n".join(unsafe))
            return result

        return operation

    for name in OPERATIONS:
        setattr(files, name, wrap(name, getattr(files, name)))
    return lambda: count


def crash(base: Path, number: int, step: int, *, power_cut: bool) -> dict[str, Any]:
    """Steps 1 and 2 are saved; a child saves `step` with keep=store.Keep(1) and dies at operation `number`; then a start."""
    import torch

    from megatune.checkpoint import store
    from tests.unit.test_store import Alone, make_state, same, zeros

    folder = base / f"{step}-{number}-{power_cut}"
    for old in (1, 2):
        store.save(folder, old, make_state(old), {"value": old}, Alone(), background=False)
    child = os.fork()
    if child == 0:
        count = die_at(number, base / "unsynced")
        store.save(folder, step, make_state(50), {"value": 50}, Alone(), keep=store.Keep(1)).wait()
        os._exit(count() < number)
    _, status = os.waitpid(child, 0)
    if power_cut:
        for name in (base / "unsynced").read_text().split("\n"):
            if name and os.path.exists(name):
                os.truncate(name, os.path.getsize(name) // 2)
    state = zeros(make_state())
    found = store.restore(folder, state, Alone())
    value = found[1]["value"] if found else None
    torch.manual_seed(0)
    return {
        "step": step,
        "operation": number,
        "killed": os.WIFSIGNALED(status),
        "value": value,
        "right": found is not None and same(state, make_state(value)),
        "left_over": [name for name in os.listdir(folder) if name.startswith(".")],
        "quick_look_agrees": store.newest(folder) == (found and found[0]),
    }


def main(base: Path) -> None:
    results = []
    for step in (3, 2):  # a new step, and one that is there already
        for power_cut in (False, True):
            number = 1
            while True:
                results.append(crash(base, number, step, power_cut=power_cut))
                if not results[-1]["killed"]:
                    break
                number += 1
    (base / "results.json").write_text(json.dumps(results))


def test_kill_at_every_operation(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.getenv("PYTHONPATH")])),
    }
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment, timeout=120)
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(result["right"] for result in results), [r for r in results if not r["right"]]
    assert not any(result["left_over"] for result in results)
    assert all(result["quick_look_agrees"] for result in results)
    for step in (2, 3):
        crashes = [r for r in results if r["killed"] and r["step"] == step]
        assert len(crashes) > 40
        # It died before the new one was there, and after; the old value is the newest one saved before.
        assert {r["value"] for r in crashes} == {2, 50}
    assert [r["value"] for r in results if not r["killed"]] == [50] * 4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
