"""The checkpoint store in one process: what is saved is what loads, and damage is seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatune.checkpoint import files, manifest, reader, store
from megatune.checkpoint.boxes import hull, tile_exactly
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts


class Alone:
    """One process."""

    rank = 0
    world_size = 1
    is_main = True

    def broadcast(self, value):
        return value

    def max(self, values):
        return values

    def gather_objects(self, value):
        return [value]


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


def make_state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "model/a": torch.randn(7, 5),
        "model/half": torch.randn(3, 4, 5).bfloat16(),
        "model/mask": torch.tensor([True, False, True]),
        "optim/steps": torch.tensor(3 + seed),
        "optim/scale": torch.tensor(0.1 + seed, dtype=torch.float64),
        "optim/empty": torch.empty(0, 4),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def save(folder: Path, step: int, **options) -> dict[str, torch.Tensor]:
    state = make_state(step)
    store.save(folder, step, state, {"step": step}, Alone(), **options).wait()
    return state


def test_round_trip_of_every_dtype_and_shape(tmp_path: Path) -> None:
    state = save(tmp_path, 120)
    step_folder = tmp_path / "step-000120"
    assert store.newest(tmp_path) == step_folder
    assert sorted(path.name for path in step_folder.iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "run.json",
    ]
    store.verify(step_folder)
    target = zeros(state)
    assert store.load(step_folder, target) == {"step": 120}
    assert same(state, target)
    # The shards are ordinary safetensors, the manifest ordinary JSON.
    assert same(state, load_file(step_folder / "rank-00000.safetensors"))
    listed = json.loads((step_folder / "manifest.json").read_text())["manifest"]["tensors"]
    assert listed["model/half"] == {
        "dtype": "BF16",
        "shape": [3, 4, 5],
        "chunks": [
            {"file": "rank-00000.safetensors", "key": "model/half", "offset": [0, 0, 0], "shape": [3, 4, 5]}
        ],
    }
    assert json.loads((step_folder / "run.json").read_text())["versions"]["torch"] == str(torch.__version__)


def test_tensors_larger_than_a_block_and_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_SLAB_BYTES", manifest.BLOCK_BYTES)
    state = {"big": torch.randn(3, 1000, 1100), "other": torch.arange(5)}
    store.save(tmp_path, 1, state, {}, Alone()).wait()
    target = zeros(state)
    store.load(tmp_path / "step-000001", target)
    assert same(state, target)
    entry = manifest.read_manifest(tmp_path / "step-000001").files["rank-00000.safetensors"]
    assert len(entry.checksums) == 4
    # A flipped bit in the last block is found by the tensor that lies there, and by no other.
    flip(tmp_path / "step-000001" / "rank-00000.safetensors", entry.size - 1, 3)
    store.load(tmp_path / "step-000001", {"other": torch.zeros(5, dtype=torch.int64)}, strict=False)
    with pytest.raises(
        manifest.DamagedError, match="rank-00000.safetensors is damaged between bytes 12582912"
    ):
        store.load(tmp_path / "step-000001", target)


def test_checkpoints_of_format_1_still_load(tmp_path: Path) -> None:
    """Their blocks have CRC-32 checksums, which are still looked at."""
    state = {"big": torch.randn(1100, 1100), "other": torch.arange(5)}
    folder = store.save(tmp_path, 1, state, {"a": 1}, Alone(), background=False).folder
    data = json.loads((folder / "manifest.json").read_text())["manifest"]
    data["format"] = 1
    for name, entry in data["files"].items():
        text, block = (folder / name).read_bytes(), manifest.BLOCK_BYTES
        assert set(entry) == {"size", "xxh3_64"}
        assert len(entry.pop("xxh3_64")) == 16 * -(-len(text) // block)
        checksums = (zlib.crc32(text[start : start + block]) for start in range(0, len(text), block))
        entry["crc32"] = "".join(f"{value:08x}" for value in checksums)
    body = json.dumps(data).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / "manifest.json").write_bytes(b'{"sha256": "' + digest + b'",\n"manifest": ' + body + b"}\n")
    target = zeros(state)
    assert store.load(folder, target) == {"a": 1}
    assert same(state, target)
    store.verify(folder)
    for file, place in (("rank-00000.safetensors", 4_500_000), ("run.json", 3)):
        flip(folder / file, place, 5)
        with pytest.raises(manifest.DamagedError, match=f"{file} is damaged between bytes"):
            store.load(folder, target)
        flip(folder / file, place, 5)


def test_state_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    state = {"a": torch.arange(1_000_000.0), "transposed": torch.arange(6.0).view(2, 3).T}
    before = {name: tensor.clone() for name, tensor in state.items()}
    pending = store.save(tmp_path, 1, state, {}, Alone())
    for tensor in state.values():
        tensor.zero_()
    pending.wait()
    assert pending.is_done
    assert pending.folder == tmp_path / "step-000001"
    store.load(pending.folder, state)
    assert same(state, before)


def test_foreground_save_is_there_when_it_returns(tmp_path: Path) -> None:
    state = make_state()
    pending = store.save(tmp_path, 5, state, {"x": [1, None]}, Alone(), background=False)
    assert pending.is_done
    target = zeros(state)
    assert store.load(tmp_path / "step-000005", target) == {"x": [1, None]}
    assert same(state, target)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    store.save(tmp_path, 3, make_state(99), {"again": True}, Alone()).wait()
    target = zeros(make_state())
    assert store.load(tmp_path / "step-000003", target) == {"again": True}
    assert same(target, make_state(99))
    assert os.listdir(tmp_path) == ["step-000003"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"model/new": torch.zeros(2)}), "lacks model/new"),
        (
            lambda s: s.update({"model/a": torch.zeros(5, 7)}),
            r"model/a has shape \(7, 5\), this run needs \(5, 7\)",
        ),
        (
            lambda s: s.update({"model/a": torch.zeros(7, 5).double()}),
            "model/a has dtype torch.float32, this run",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_filled(
    tmp_path: Path, change, message: str
) -> None:
    save(tmp_path, 1)
    target = zeros(make_state())
    change(target)
    with pytest.raises(CheckpointError, match=message) as caught:
        store.load(tmp_path / "step-000001", target)
    assert not isinstance(caught.value, manifest.DamagedError)
    assert all(not tensor.any() for tensor in target.values())
    with pytest.raises(CheckpointError, match=message):
        store.restore(tmp_path, target, Alone())
    if "model/new" in target:  # names alone may differ where the caller says so
        store.load(tmp_path / "step-000001", target, strict=False)
        assert target["optim/steps"] == 4


def test_what_no_process_wants_is_refused_by_a_start_only(tmp_path: Path) -> None:
    state = save(tmp_path, 1)
    target = zeros(state)
    del target["model/a"]
    with pytest.raises(CheckpointError, match="holds model/a too"):
        store.restore(tmp_path, target, Alone())
    assert all(not tensor.any() for tensor in target.values())
    store.load(tmp_path / "step-000001", target)  # another process may have it
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.items())


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    """Several boxes of one tensor in one file; loaded into a view of something larger."""
    whole = torch.arange(60.0).view(5, 12)
    boxes = [Box((0, 0), (1, 7)), Box((0, 7), (1, 5)), Box((1, 0), (4, 12))]
    parts = Parts((5, 12), tuple((box, box.of(whole)) for box in boxes), True)
    store.save(
        tmp_path, 1, {"p": parts, "none": Parts((3, 3), (), True), "plain": torch.ones(2)}, {}, Alone()
    ).wait()
    step = tmp_path / "step-000001"
    store.verify(step)
    room = torch.zeros(9, 12)
    box = Box((1, 3), (3, 4))
    store.load(step, {"p": Parts((5, 12), ((box, room[2:5, 3:7]),), False)})
    assert torch.equal(room[2:5, 3:7], box.of(whole))
    assert room.count_nonzero() == 12
    assert store.written_bytes({"p": parts, "q": Parts((3, 3), ((box, room),), False)}) == 240
    with pytest.raises(CheckpointError, match=r"p has shape \(5, 12\), this run needs \(5, 13\)"):
        store.load(step, {"p": Parts((5, 13), (), False)})
    missing = Parts((5, 12), parts.parts[1:], True)
    with pytest.raises(CheckpointError, match=r"p: its chunks do not cover \(5, 12\) exactly once"):
        store.save(tmp_path, 2, {"p": missing}, {}, Alone()).wait()


@pytest.mark.parametrize("slab", [1, 2**26])
def test_reading_parts_of_matrices_reads_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    monkeypatch.setattr(reader, "_SLAB_BYTES", slab)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 64)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 64)
    whole = torch.randn(6, 40, 10)
    store.save(tmp_path, 1, {"experts": whole}, {}, Alone()).wait()
    sizes: list[int] = []
    read = reader.CheckpointFile.read
    monkeypatch.setattr(
        reader.CheckpointFile,
        "read",
        lambda self, start, stop: sizes.append(stop - start) or read(self, start, stop),
    )
    for box in (Box((1, 7, 0), (3, 2, 10)), Box((0, 0, 3), (6, 40, 2)), Box((5, 39, 9), (1, 1, 1))):
        sizes.clear()
        found = torch.zeros(box.shape)
        store.load(tmp_path / "step-000001", {"experts": Parts((6, 40, 10), ((box, found),), False)})
        assert torch.equal(found, box.of(whole))
        rows = box.shape[0] * box.shape[1]
        assert sum(sizes) < rows * 40 + 2000  # whole rows of 40 bytes, run.json and a header


def test_unsavable_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x: tensors of dtype torch\.complex64"):
        store.save(tmp_path, 1, {"x": torch.zeros(2, dtype=torch.complex64)}, {}, Alone())


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_no_flipped_bit_is_accepted(tmp_path: Path) -> None:
    """MEGATUNE_FLIPS=N: N random bits of all files of a checkpoint (default 150)."""
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    generator = random.Random(0)
    step_folder = tmp_path / "step-000002"
    whole = {path: path.read_bytes() for path in sorted(step_folder.iterdir())}
    places = [(path, byte) for path, data in whole.items() for byte in range(len(data))]
    refused = 0
    for number in range(int(os.environ.get("MEGATUNE_FLIPS", "150"))):
        path, byte = generator.choice(places)
        flip(path, byte, generator.randrange(8))
        with pytest.raises(manifest.DamagedError, match=path.name):
            store.load(step_folder, zeros(bad))
        if number % 10 == 0:
            with pytest.raises(manifest.DamagedError, match=path.name):
                store.verify(step_folder)
        path.write_bytes(whole[path])
        refused += 1
    print(f"{refused} flips in {len(whole)} files of {len(places)} bytes, all refused")
    reasons: list[str] = []
    flip(step_folder / "rank-00000.safetensors", 300, 0)
    target = zeros(good)
    assert store.newest(tmp_path) == step_folder  # sizes are right, bytes are looked at while loading
    assert store.restore(tmp_path, target, Alone(), reasons.append) == (tmp_path / "step-000001", {"step": 1})
    assert same(target, good)
    assert len(reasons) == 1
    assert "step-000002 is passed over" in reasons[0]
    assert "is damaged between bytes 0 and" in reasons[0]


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "missing", "longer", "empty"])
def test_torn_checkpoints_are_passed_over(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-000002" / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "longer": data + b" ", "empty": b""}[how])
    reasons: list[str] = []
    assert store.newest(tmp_path, reasons.append) == tmp_path / "step-000001"
    assert len(reasons) == 1
    assert name in reasons[0]
    with pytest.raises(CheckpointError, match=name):
        store.verify(tmp_path / "step-000002")


def test_nothing_whole_is_an_error_and_nothing_at_all_is_not(tmp_path: Path) -> None:
    state = zeros(make_state())
    assert store.restore(tmp_path / "nowhere", state, Alone()) is None
    assert store.newest(tmp_path / "nowhere") is None
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "manifest.json").unlink()
    assert store.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole"):
        store.restore(tmp_path, state, Alone())


def test_retention_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-000004" / "run.json").unlink()  # the newest is torn
    assert store.prune(tmp_path, store.Keep(1)) == [tmp_path / "step-000002", tmp_path / "step-000001"]
    assert store.steps(tmp_path) == [tmp_path / "step-000003", tmp_path / "step-000004"]
    (tmp_path / "step-000003" / "run.json").unlink()
    assert store.prune(tmp_path, store.Keep(1)) == []  # none valid: nothing goes
    save(tmp_path, 5, keep=store.Keep(1))
    assert store.steps(tmp_path) == [tmp_path / "step-000005"]
    with pytest.raises(ValueError, match="at least 1"):
        store.prune(tmp_path, store.Keep(0))


def test_steps_are_numbers_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert store.newest(tmp_path) == tmp_path / "step-1000000"
    store.prune(tmp_path, store.Keep(1))
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-1000000", "step-final"]


def test_clean_removes_what_dead_processes_left(tmp_path: Path) -> None:
    state = save(tmp_path, 1)
    (tmp_path / ".step-000002.00ff00ff").mkdir()
    (tmp_path / ".step-000002.00ff00ff" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".step-000002.00ff00ff.failed").write_text("why")
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000001.aa.replaced")
    os.rename(tmp_path / "step-000001", tmp_path / ".step-000001.bb.replaced")
    removed = store.clean(tmp_path)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert len(removed) == 3
    target = zeros(state)
    store.load(tmp_path / "step-000001", target)
    assert same(target, state)
    assert store.clean(tmp_path / "nowhere") == []


class FailAt:
    """Stands in for every file operation; the n-th one fails, a write after half of its bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int = errno.ENOSPC) -> None:
        self.count = 0
        self.number = number
        self.failed = ""
        for name in OPERATIONS:
            monkeypatch.setattr(files, name, self._wrap(name, getattr(files, name), code))

    def _wrap(self, name, original, code):
        def operation(*args):
            self.count += 1
            if self.count == self.number:
                self.failed = name
                if name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                raise OSError(code, os.strerror(code))
            return original(*args)

        return operation


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_disk_full_at_every_operation(tmp_path: Path, again: bool) -> None:
    """Whatever operation fails: an error says so, or the new checkpoint is whole; the old one is never lost."""
    step = 1 if again else 2
    number, errors = 0, 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        old = save(folder, 1)
        new = make_state(50)
        with pytest.MonkeyPatch.context() as patch:
            shim = FailAt(patch, number)
            try:
                pending = store.save(folder, step, new, {"new": True}, Alone(), keep=store.Keep(1))
                pending.wait()
                failed = None
            except CheckpointError as error:
                failed = str(error)
        if not shim.failed:
            break
        target = zeros(old)
        path, extra = store.restore(folder, target, Alone())
        store.verify(path)
        assert same(target, new if extra == {"new": True} else old)
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        if failed is None:
            assert extra == {"new": True}
            assert shim.failed in (
                "rename",
                "sync_folder",
                "remove_tree",
            )  # pruning, after the checkpoint was there
        else:
            errors += 1
            assert "No space left on device" in failed
            assert "saved" in failed
            pending = store.save(folder, 3, new, {}, Alone())  # and the next save works
            pending.wait()
    assert errors > 15
    assert number > 20


def test_an_error_in_the_background_comes_up_at_the_next_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        FailAt(patch, 3, errno.EIO)
        pending = store.save(tmp_path, 2, make_state(), {}, Alone())
        pending._thread.join()
    with pytest.raises(
        CheckpointError, match="step 2 was not saved: Input/output error in .*earlier checkpoints"
    ):
        pending.check()
    pending.check()  # told once
    assert os.listdir(tmp_path) == ["step-000001"]
    with monkeypatch.context() as patch:
        FailAt(patch, 3, errno.EIO)
        store.save(tmp_path, 2, make_state(), {}, Alone())._thread.join()
    with pytest.raises(CheckpointError, match="step 2 was not saved"):  # nobody looked: the next save says it
        store.save(tmp_path, 3, make_state(), {}, Alone())


def test_bytes_that_change_on_their_way_to_the_disk_are_found_by_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write

    def corrupt(descriptor: int, data) -> None:
        write(descriptor, bytes([data[0] ^ 1, *data[1:]]))

    monkeypatch.setattr(files, "write", corrupt)
    with pytest.raises(manifest.DamagedError, match="is damaged"):
        store.save(tmp_path, 1, make_state(), {}, Alone()).wait()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step-000001 cannot be saved: .*file.* cannot be written"):
        store.save(tmp_path / "file" / "checkpoints", 1, make_state(), {}, Alone())


def test_space_is_checked_with_numbers(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1000, 1000), "b": torch.zeros(1000, dtype=torch.bfloat16)}
    assert store.written_bytes(state) == 4_002_000
    store.check_space(tmp_path / "not" / "yet", store.written_bytes(state))
    with pytest.raises(CheckpointError, match=r"GiB free and this run's .* need 1048576\.00 GiB"):
        store.check_space(tmp_path / "not" / "yet", 2**50)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        store.check_space(tmp_path / "file" / "x", 1)


def test_boxes() -> None:
    assert Box((0, 2), (2, 2)) & Box((1, 3), (4, 4)) == Box((1, 3), (1, 1))
    assert Box((0,), (2,)) & Box((2,), (2,)) is None
    assert Box((), ()) & Box((), ()) == Box((), ())
    grid = [Box((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]
    assert tile_exactly(grid, (4, 6))
    assert tile_exactly([*grid, Box((4, 0), (0, 6))], (4, 6))
    assert not tile_exactly(grid[1:], (4, 6))
    assert not tile_exactly([*grid[1:], grid[1]], (4, 6))
    pinwheel = [
        Box((0, 0), (1, 2)),
        Box((0, 2), (2, 1)),
        Box((2, 1), (1, 2)),
        Box((1, 0), (2, 1)),
        Box((1, 1), (1, 1)),
    ]
    assert tile_exactly(pinwheel, (3, 3))
    assert not tile_exactly([*pinwheel[:-1], Box((0, 0), (1, 1))], (3, 3))
    assert not tile_exactly([Box((1,), (2,))], (2,))
    assert tile_exactly([], (0, 3))
    assert tile_exactly([Box((), ())], ())
    assert not tile_exactly([Box((), ()), Box((), ())], ())
    # Flat shards of odd sizes of a matrix, of which another process has the other columns.
    left = [Box((0, 0), (1, 2)), Box((0, 2), (1, 1)), Box((1, 0), (2, 3)), Box((3, 0), (1, 3))]
    right = [Box((0, 3), (2, 3)), Box((2, 3), (2, 3))]
    assert tile_exactly([*left, *right], (4, 6))
    assert not tile_exactly([*left, Box((0, 3), (2, 3)), Box((1, 3), (2, 3))], (4, 6))
    assert hull([Box((2, 0), (1, 4)), Box((3, 1), (2, 5))]) == Box((2, 0), (3, 6))
