"""A save that is cut anywhere: the next start finds the checkpoint before it or the new one, whole.

Every file operation of a save is recorded, and each prefix of them replayed into a fresh folder: as `kill -9` leaves it
(all that was done is there), and as a power cut may leave it (any part of what was not synced is lost). Beside it, a
process is really killed. MEGATUNE_CRASH=N: N random subsets of what is lost for each prefix (default 2), and a kill at
every operation instead of every fifth.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
DRAWS = int(os.environ.get("MEGATUNE_CRASH", "2"))
NEW = 50
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


def _save_new(folder: Path, step: int) -> None:
    from megatune.checkpoint import store
    from tests.unit.test_store import Alone, make_state

    store.save(folder, step, make_state(NEW), {"value": NEW}, Alone(), keep=store.Keep(1)).wait()


def _save_by_two(folder: Path, step: int) -> None:
    """As two processes would, in two threads."""
    from megatune.checkpoint import files, store
    from megatune.checkpoint.plan import make_plan
    from megatune.checkpoint.staging import Staging
    from megatune.checkpoint.writer import Job, Merged, PendingSave
    from tests.unit.test_store import make_state

    temporary = folder / f".step-{step:06d}.00ff00ff"
    files.make_folder(temporary)
    run = json.dumps({"step": step, "extra": {"value": NEW}}).encode()
    pending = []
    for rank in range(2):
        plan = make_plan(make_state(NEW), rank, 2)
        assert plan.pieces
        job = Job(
            temporary=temporary,
            final=folder / f"step-{step:06d}",
            step=step,
            rank=rank,
            world_size=2,
            plan=plan,
            staging=Staging(plan),
            merged=Merged(),
            run_text=run,
            after=lambda: store.prune(folder, store.Keep(1)) and None,
            timeout=30,
            copies=True,
        )
        pending.append(PendingSave(job, background=True))
    for one in pending:
        one.wait()


# What is saved before, the step of the new one, and how it is saved.
CASES: dict[str, tuple[tuple[int, ...], int, Callable[[Path, int], None]]] = {
    "a new step": ((1, 2), 3, _save_new),
    "the same step again": ((1, 2), 2, _save_new),
    "the first one": ((), 3, _save_new),
    "two processes": ((1, 2), 3, _save_by_two),
}


def _record(base: Path, case: str, ignored: tuple[str, ...] = ()) -> Any:
    from megatune.checkpoint import store
    from tests.helpers.disk import Recorder
    from tests.unit.test_store import Alone, make_state

    before, step, save = CASES[case]
    folder = base / "checkpoints"
    folder.mkdir()
    for old in before:
        store.save(folder, old, make_state(old), {"value": old}, Alone(), background=False)
    recorder = Recorder(folder, ignored)
    with recorder.recording():
        save(folder, step)
    return recorder


def _start(folder: Path, before: tuple[int, ...]) -> int | None:
    """The value that a start finds in a folder; asserts that it is whole, and one of those that may be there."""
    from megatune.checkpoint import store
    from tests.unit.test_store import Alone, make_state, same, zeros

    state = zeros(make_state())
    found = store.restore(folder, state, Alone())
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    if found is None:
        assert not before
        return None
    value = found[1]["value"]
    assert value in (NEW, *before[-1:])
    assert same(state, make_state(value))
    assert store.newest(folder) == found[0]
    return value


def _crashes(recorder: Any, draws: int) -> Any:
    """(operations done, what the disk holds): every prefix, as a kill and as power cuts may leave it."""
    generator = random.Random(0)
    for count in range(len(recorder.operations) + 1):
        yield count, recorder.crash(count, lambda _: True)
        yield count, recorder.crash(count, lambda _: True, half=True)
        yield count, recorder.crash(count, lambda _: False)
        yield count, recorder.crash(count, lambda operation: operation.is_data)
        for zeros in (False, True):
            yield count, recorder.crash(count, lambda operation: not operation.is_data, zeros=zeros)
        for draw in range(draws):
            yield count, recorder.crash(count, lambda _: generator.random() < 0.5, zeros=draw % 2 > 0)


def _replay(recorder: Any, base: Path, before: tuple[int, ...], draws: int) -> list[tuple[int, int | None]]:
    from tests.helpers.disk import kinds_of, tree_of, write_out

    kinds, found, values = kinds_of(recorder), [], {}
    for count, nodes in _crashes(recorder, draws):
        tree = tree_of(nodes, kinds, recorder.root)
        key = repr(tree)
        if key not in values:  # many crashes leave the same
            folder = base / str(len(values))
            write_out(tree, folder)
            values[key] = _start(folder, before)
        found.append((count, values[key]))
    print(f"{len(recorder.operations)} operations, {len(found)} crashes, {len(values)} different disks")
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_prefix_of_a_save(tmp_path: Path, case: str) -> None:
    from megatune.checkpoint import store
    from tests.unit.test_store import Alone, make_state

    before = CASES[case][0]
    recorder = _record(tmp_path, case)
    (tmp_path / "replayed").mkdir()
    found = _replay(recorder, tmp_path / "replayed", before, DRAWS)
    assert {value for _, value in found} == {NEW, before[-1] if before else None}
    # From one operation on it is the new one whatever is lost: nothing older is removed before that.
    last_old = max(count for count, value in found if value != NEW)
    removals = [
        index
        for index, operation in enumerate(recorder.operations)
        if (operation.kind, operation.name) == ("rename", "step-000001")
    ]
    assert len(removals) == bool(before)
    assert all(index >= last_old for index in removals)
    # And the run goes on to save.
    for folder in sorted((tmp_path / "replayed").iterdir())[::25]:
        store.save(folder, 4, make_state(4), {"value": 4}, Alone(), keep=store.Keep(1)).wait()
        assert _start(folder, (4,)) == 4


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_a_sync_that_is_forgotten_is_seen(tmp_path: Path, forgotten: str) -> None:
    from megatune.errors import CheckpointError

    recorder = _record(tmp_path, "a new step", (forgotten,))
    (tmp_path / "replayed").mkdir()
    with pytest.raises((AssertionError, CheckpointError)):
        _replay(recorder, tmp_path / "replayed", (1, 2), 4)


def die_at(number: int) -> Callable[[], int]:
    """Kill this process at its n-th file operation, half-way through if it is a write or the removal of a folder.
    Returns a count of operations."""
    from megatune.checkpoint import files

    count = 0

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
            return original(*args)

        return operation

    for name in OPERATIONS:
        setattr(files, name, wrap(name, getattr(files, name)))
    return lambda: count


def crash(base: Path, number: int, step: int) -> dict[str, Any]:
    """Steps 1 and 2 are saved; a child saves `step`, keeps one, and dies at operation `number`; then a start."""
    from megatune.checkpoint import store
    from tests.unit.test_store import Alone, make_state

    folder = base / f"{step}-{number}"
    for old in (1, 2):
        store.save(folder, old, make_state(old), {"value": old}, Alone(), background=False)
    child = os.fork()
    if child == 0:
        count = die_at(number)
        _save_new(folder, step)
        os._exit(count() < number)
    _, status = os.waitpid(child, 0)
    value = _start(folder, (1, 2))
    return {"step": step, "operation": number, "killed": os.WIFSIGNALED(status), "value": value}


def main(base: Path, stride: int) -> None:
    results = []
    for step in (3, 2):  # a new step, and one that is there already
        number = 1
        while True:
            results.append(crash(base, number, step))
            if not results[-1]["killed"]:
                break
            number += stride
    (base / "results.json").write_text(json.dumps(results))


def test_kill_at_operations(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.getenv("PYTHONPATH")])),
    }
    stride = 1 if "MEGATUNE_CRASH" in os.environ else 5
    command = [sys.executable, __file__, str(tmp_path), str(stride)]
    subprocess.run(command, check=True, env=environment, timeout=250)
    results = json.loads((tmp_path / "results.json").read_text())
    for step in (2, 3):
        crashes = [r for r in results if r["killed"] and r["step"] == step]
        assert len(crashes) > 20 / stride
        # It died before the new one was there, and after; the old value is the newest one saved before.
        assert {r["value"] for r in crashes} == {2, NEW}
    assert [r["value"] for r in results if not r["killed"]] == [NEW] * 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
