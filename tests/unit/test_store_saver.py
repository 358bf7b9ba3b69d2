"""Saves of one run: what is made once, what training waits for, and which checkpoints stay."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatune.checkpoint import files, manifest, staging, store, writer
from megatune.checkpoint.manifest import FileEntry
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box
from tests.unit.test_store import Alone, make_state, same, zeros


def test_the_copy_is_made_in_memory_that_is_used_again(tmp_path: Path) -> None:
    state = {**make_state(), "model/transposed": torch.arange(6.0).view(2, 3).T}
    saver = store.Saver(tmp_path, state, Alone())
    saver.prepare()
    places = set()
    for step in (1, 2, 3):
        for tensor in state.values():
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + step)
        wanted = {name: tensor.clone() for name, tensor in state.items()}
        pending = saver.save(step, {"n": step})
        pending.wait_staged()
        for tensor in state.values():
            tensor.zero_()
        pending.wait()
        assert pending.seconds > 0
        places.add(saver._staging._buffer.bytes.data_ptr())
        assert store.load(pending.folder, state) == {"n": step}
        assert same(state, wanted)
    assert len(places) == 1
    assert saver._staging._buffer.bytes.numel() == sum(tensor.nbytes for tensor in state.values())


def test_training_goes_on_before_the_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    saver = store.Saver(tmp_path, state, Alone())
    begun = threading.Event()
    copy = staging.Staging.copy
    monkeypatch.setattr(staging.Staging, "copy", lambda *args: begun.wait(10) and copy(*args))
    pending = saver.save(1, {})
    assert not pending._staged.is_set()  # forward and backward
    assert pending.seconds is None
    begun.set()
    pending.wait_staged()
    for tensor in state.values():
        tensor.zero_()
    pending.wait()
    store.load(pending.folder, state)
    assert same(state, make_state())


@pytest.mark.parametrize("background", [True, False])
def test_without_memory_for_a_copy_training_waits_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    monkeypatch.setattr(staging, "free_memory", lambda: 100)
    state, warnings = make_state(), []
    saver = store.Saver(tmp_path, state, Alone(), warn=warnings.append)
    assert "training waits for the disk" in warnings[0]
    saver.prepare()
    pending = saver.save(1, {}, background=background)
    pending.wait_staged()
    assert saver._staging._buffer is None
    for tensor in state.values():
        tensor.zero_()
    pending.wait()
    store.load(pending.folder, state)
    assert same(state, make_state())
    store.verify(pending.folder)


def test_a_save_that_is_waited_for_copies_nothing(tmp_path: Path) -> None:
    state = make_state()
    saver = store.Saver(tmp_path, state, Alone())
    pending = saver.save(1, {}, background=False)
    assert pending.is_done and pending.seconds > 0
    assert saver._staging._buffer is None
    target = zeros(state)
    store.load(pending.folder, target)
    assert same(target, state)


def test_a_failure_lets_training_go_on_to_hear_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, **_) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(staging, "HostBuffer", full)
    pending = store.Saver(tmp_path, make_state(), Alone()).save(1, {})
    pending.wait_staged()
    with pytest.raises(CheckpointError, match="step 1 was not saved: MemoryError"):
        pending.wait()
    assert pending.seconds is None


def test_free_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    assert 0 < staging.free_memory() < 2**50
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("inactive_file 50\nactive_file 20\nanon 830\n")
    assert staging._free_in(tmp_path, 5000) == 170
    (tmp_path / "memory.max").write_text("max\n")
    assert staging._free_in(tmp_path, 5000) == 5000
    assert staging._free_in(tmp_path / "none", 5000) == 5000


def test_the_manifests_tensors_are_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    check = writer.check_tensors
    monkeypatch.setattr(writer, "check_tensors", lambda *args: checks.append(1) or check(*args))
    saver = store.Saver(tmp_path, make_state(), Alone())
    for step in (1, 2, 3):
        saver.save(step, {}).wait()
    assert len(checks) == 1
    texts = [manifest.read_manifest(path).tensors for path in store.steps(tmp_path)]
    assert texts[0] == texts[1] == texts[2]


def notes(ranks: int, rows: int = 3) -> list[writer.Note]:
    """Of matrices and experts that are cut among the processes as ZeRO cuts them: within rows."""
    found = []
    for rank in range(ranks):
        name = f"rank-{rank:05d}.safetensors"
        chunks = [([rank * rows, 0], [rows - 1, 7]), ([rank * rows + rows - 1, 0], [1, 4])]
        chunks.append(([rank * rows + rows - 1, 4], [1, 3]))
        tensors = {
            f"w{index}": {
                "dtype": "F32",
                "shape": [ranks * rows, 7],
                "chunks": [{"file": name, "key": f"w{index}", "offset": o, "shape": s} for o, s in chunks],
            }
            for index in range(4)
        }
        tensors["experts"] = {
            "dtype": "F32",
            "shape": [2, ranks, 5],
            "chunks": [
                {"file": name, "key": f"e{e}", "offset": [e, rank, 0], "shape": [1, 1, 5]} for e in range(2)
            ],
        }
        text = json.dumps(tensors).encode()
        found.append(writer.Note("", str(rank), {name: FileEntry(0, ())}, text))
    return found


def test_merging_takes_work_in_proportion_to_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    and_ = Box.__and__
    monkeypatch.setattr(Box, "__and__", lambda self, other: compared.append(1) or and_(self, other))

    def calls(ranks: int) -> int:
        made, count = notes(ranks), 0

        def one_more(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(one_more)
        try:
            text = writer.Merged().text(made)
        finally:
            sys.setprofile(None)
        assert all(len(entry["chunks"]) >= 2 * ranks for entry in json.loads(text).values())
        return count

    assert calls(256) < 4.5 * calls(64)  # 4 times as many; quadratic would be 16
    assert not compared  # no box with every other


def test_processes_that_do_not_fit_together_are_refused() -> None:
    def changed(rank: int, old: str, new: str) -> list[writer.Note]:
        made = notes(4)
        text = made[rank].tensors.decode().replace(old, new).encode()
        made[rank] = writer.Note("", "x", made[rank].files, text)
        return made

    merged = writer.Merged()
    merged.text(notes(4))
    with pytest.raises(CheckpointError, match="w0 is BF16 .* on rank 2, F32 .* elsewhere; nothing was saved"):
        merged.text(changed(2, "F32", "BF16"))
    with pytest.raises(CheckpointError, match="its chunks do not cover"):
        merged.text(changed(1, "[1, 4]", "[1, 3]"))
    with pytest.raises(CheckpointError, match="lies in a file that was not written"):
        merged.text(changed(1, "rank-00001", "rank-00009"))


def saved(folder: Path, step: int, metric: float | None = None, keep: store.Keep | None = None) -> None:
    store.save(folder, step, {"a": torch.ones(2)}, {}, Alone(), metric=metric, keep=keep, background=False)


def left(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in store.steps(folder)]


def test_keep_every_and_best(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: 1.0, 50: None, 60: float("nan"), 70: 1.5, 80: 4.0}
    for step, loss in losses.items():
        saved(tmp_path, step, loss)
    assert [path.name for path in store.best(tmp_path, 3)] == ["step-000040", "step-000070", "step-000020"]
    assert store.metric(tmp_path / "step-000030") == 2.5
    assert store.metric(tmp_path / "step-000060") is None
    assert store.prune(tmp_path, store.Keep(7)) == [tmp_path / "step-000010"]
    assert left(tmp_path) == [20, 30, 40, 50, 60, 70, 80]
    store.prune(tmp_path, store.Keep(1, every=30, best=2))
    assert left(tmp_path) == [30, 40, 60, 70, 80]
    saved(tmp_path, 90, 0.5, store.Keep(1, best=2))
    assert left(tmp_path) == [40, 90]
    saved(tmp_path, 100, 9.0, store.Keep(1, best=2))
    assert left(tmp_path) == [40, 90, 100]
    (tmp_path / "step-000090" / "manifest.json").unlink()  # damaged ones are not among the best
    saved(tmp_path, 110, 8.0, store.Keep(1, best=2))
    assert left(tmp_path) == [40, 110]


def test_equal_metrics_prefer_the_newer(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step, 1.0)
    saved(tmp_path, 4, 2.0, store.Keep(1, best=1))
    assert left(tmp_path) == [3, 4]


def test_a_folder_is_durable_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = files.sync_folder
    monkeypatch.setattr(files, "sync_folder", lambda path: synced.append(path) or sync(path))
    saved(tmp_path / "runs" / "x", 1)
    assert synced[:2] == [tmp_path, tmp_path / "runs"]


def test_states_of_quantised_optimizers(tmp_path: Path) -> None:
    """Any names; codes of 8 bits with the largest value of each block of a row, fp8, and steps of a parameter."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (33, 512), dtype=torch.uint8)
    state = {
        "model/w": torch.randn(33, 512, dtype=torch.bfloat16),
        "optim/state1/w": codes,
        "optim/absmax1/w": torch.rand(33, 2),
        "optim/state2/w": torch.randn(33, 512).to(torch.float8_e4m3fn),
        "optim/scale/w": torch.tensor(0.25, dtype=torch.float64),
        "optim/qmap": torch.linspace(-1, 1, 256),
        "optim/step/w": torch.tensor([7], dtype=torch.int64),
    }
    pending = store.save(tmp_path, 1, state, {}, Alone())
    pending.wait()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    store.load(pending.folder, target)
    for name, tensor in state.items():
        assert torch.equal(
            target[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name
