"""Checkpoint folders that somebody made to do harm: one clear error, nothing run, no memory taken.

All of them have right checksums: these are no secret.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatune.checkpoint import manifest, retention, store
from megatune.errors import CheckpointError
from tests.unit.test_store import Alone

SHARD = "rank-00000.safetensors"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    state = {"w": torch.ones(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
    return store.save(tmp_path, 1, state, {"a": 1}, Alone(), background=False).folder


def framed(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest().encode()
    return b'{"sha256": "' + digest + b'",\n"manifest": ' + body + b"}\n"


def body_of(step: Path) -> dict[str, Any]:
    return json.loads((step / "manifest.json").read_text())["manifest"]


def rewrite(step: Path, change: Change) -> None:
    data = body_of(step)
    change(data)
    (step / "manifest.json").write_bytes(framed(json.dumps(data).encode()))


def refusal(step: Path) -> str:
    """The sentence with which a folder is refused by everything that reads one; little memory is taken for it."""
    target = {"w": torch.zeros(4, 6), "b": torch.zeros(3, dtype=torch.bfloat16)}
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        store.load(step, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert len(str(caught.value)) < 1000
    assert not target["w"].any()
    return str(caught.value)


def chunk(data: dict[str, Any]) -> dict[str, Any]:
    return data["tensors"]["w"]["chunks"][0]


NAMES = [
    "../rank-00000.safetensors",
    "/etc/passwd",
    ".hidden",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "",
    "..",
    7,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", [*NAMES, "x" * 300], ids=range(len(NAMES) + 1))
def test_names_that_lead_elsewhere(step: Path, name: Any) -> None:
    rewrite(step, lambda data: chunk(data).update(file=name))
    assert "is not the name of a file in the folder" in refusal(step)
    if isinstance(name, str):
        rewrite(step, lambda data: chunk(data).update(file=SHARD))
        rewrite(step, lambda data: data["files"].update({name: data["files"][SHARD]}))
        assert "is not the name of a file in the folder" in refusal(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["tensors"]["w"].update(shape=[2**61, 2**61]), "do not cover it exactly once"),
        (lambda d: d["tensors"]["w"].update(shape=[-4, -6]), "-4 is not a number"),
        (lambda d: d["tensors"]["w"].update(shape=[4.0, 6]), "4.0 is not a number"),
        (lambda d: d["tensors"]["w"].update(shape=[float("inf"), 6]), "inf is not a number"),
        (lambda d: d["tensors"]["w"].update(shape=[True, 24]), "True is not a number"),
        (lambda d: d["tensors"]["w"].update(shape=[10**3000, 6]), "is not a number of bytes"),
        (lambda d: d["tensors"]["w"].update(shape=[1] * 65), "is not the shape of a tensor"),
        (lambda d: d["tensors"]["w"].update(shape="46"), "is not the shape of a tensor"),
        (lambda d: d["tensors"]["w"].update(dtype="X9"), "is not a manifest of megatune"),
        (lambda d: d["tensors"]["w"].update(dtype=["F32"]), "is not a manifest of megatune"),
        (lambda d: chunk(d).update(offset=[0]), "does not have 2 dimensions"),
        (lambda d: chunk(d).update(offset=[1, 0]), "lies outside of its tensor"),
        (lambda d: chunk(d).update(key=3), "is not a name"),
        (lambda d: chunk(d).update(key="b"), "does not hold b as its manifest says"),
        (lambda d: d["tensors"]["w"]["chunks"].append(chunk(d)), "do not cover it exactly once"),
        (lambda d: d["tensors"]["w"].update(chunks=[]), "do not cover it exactly once"),
        (
            lambda d: d["tensors"].update(
                w={
                    "dtype": "F32",
                    "shape": [2**40],
                    "chunks": [{**chunk(d), "offset": [0], "shape": [2**40]}],
                }
            ),
            "'w' does not fit into rank-00000.safetensors",
        ),
        (
            lambda d: d["tensors"]["w"].update(
                chunks=[{**chunk(d), "shape": [2, 6]}, {**chunk(d), "shape": [2, 6]}]
            ),
            "its chunks do not cover (4, 6) exactly once",
        ),
        (lambda d: d["files"][SHARD].update(size=2**60), "checksums for 1152921504606846976 bytes"),
        (lambda d: d["files"][SHARD].update(size=-1), "-1 is not a number"),
        (lambda d: d["files"][SHARD].update(xxh3_64="z" * 16), "is not a manifest of megatune"),
        (lambda d: d["files"].pop("run.json"), "run.json is not among its files"),
        (lambda d: d.update(files=[]), "is not a manifest of megatune"),
        (lambda d: d.update(tensors=None), "is not a manifest of megatune"),
        (lambda d: d.update(step="x" * 10**5), "is not a number"),
        (lambda d: d.update(block_bytes=1), "blocks of 1 bytes"),
        (lambda d: d.update(format=3), "has format 3, this version of megatune reads up to 2"),
        (lambda d: d.update(format="x" * 10**5), "has format 'xxx"),
    ],
)
def test_manifests_that_no_writer_writes(step: Path, change: Change, message: str) -> None:
    rewrite(step, change)
    assert message in refusal(step)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "next to nothing in its brackets"),
        (b'{"a":' * 50 + b"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], " * 100_000, "is not a manifest"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "next to nothing in its brackets"),
        ((b"[" + b" " * 40) * 100_000, "nested too deep"),
        (b'{"format": 1, "format": 1}', "'format' is there twice"),
        (b'{"format": 1, "step": ' + b"9" * 10_000 + b"}", "is not a manifest"),
        (b"\xff\xfe", "is not a manifest"),
        (b"", "is not a manifest"),
        (b"null", "is not a manifest"),
        (b'"' + b"x" * 100, "is not a manifest"),
    ],
)
def test_json_that_is_none_of_ours(step: Path, body: bytes, message: str) -> None:
    (step / "manifest.json").write_bytes(framed(body))
    assert message in refusal(step)


def test_two_tensors_of_one_name(step: Path) -> None:
    text = json.dumps(body_of(step))
    twice = text.replace('"tensors": {', '"tensors": {"w": null, ', 1).encode()
    (step / "manifest.json").write_bytes(framed(twice))
    assert "'w' is there twice" in refusal(step)


def test_files_larger_than_any_of_ours(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(step / "manifest.json", "r+b") as file:
        file.truncate(2**40)  # no bytes on the disk
    assert "has 1099511627776 bytes" in refusal(step)
    with open(step / "manifest.json", "wb") as file:
        file.truncate(2**20)
    assert "does not begin as one" in refusal(step)
    monkeypatch.setattr(retention, "_LARGEST_RUN", 10)
    (step / "manifest.json").unlink()
    again = store.save(step.parent, 1, {"w": torch.ones(4, 6), "b": torch.ones(3).bfloat16()}, {}, Alone())
    again.wait()
    assert "bytes; 10 are the most" in refusal(step)


def test_links_and_pipes_are_not_opened(step: Path) -> None:
    outside = step.parent / "outside"
    for name in ("manifest.json", "run.json", SHARD):
        path = step / name
        os.rename(path, outside)
        path.symlink_to(outside)
        assert name in refusal(step)
        path.unlink()
        os.mkfifo(path)
        assert name in refusal(step)
        path.unlink()
        path.mkdir()
        assert name in refusal(step)
        path.rmdir()
        os.rename(outside, path)
    store.verify(step)
    (step.parent / "mine").mkdir()
    (step.parent / "mine" / "keep").write_text("")
    (step.parent / ".step-000009.aa").symlink_to(step.parent / "mine")
    store.clean(step.parent)
    assert (step.parent / "mine" / "keep").exists()


def set_file(step: Path, name: str, data: bytes) -> None:
    """Put a file in place, and its size and checksums into the manifest."""
    (step / name).write_bytes(data)
    checksums = manifest.BlockChecksums()
    checksums.add(data)
    rewrite(step, lambda d: d["files"].update({name: manifest.file_to_json(checksums.entry())}))


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


W = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 50_000_000) + b"{}" + b" " * 200,
        struct.pack("<Q", 100) + b"[" * 200,
        struct.pack("<Q", 4) + b"null" + b" " * 200,
        header(w={**W, "shape": [2**40, 2**40]}) + bytes(200),
        header(w={**W, "data_offsets": [0, 2**60]}) + bytes(200),
        header(w={**W, "data_offsets": [-96, 0]}) + bytes(200),
        header(w={**W, "dtype": "X"}) + bytes(200),
        header(w={**W, "shape": [6, 4]}) + bytes(96),
        b"",
    ],
    ids=range(10),
)
def test_shards_that_lie(step: Path, data: bytes) -> None:
    rewrite(step, lambda d: d["tensors"].pop("b"))
    set_file(step, SHARD, data.ljust(200, b" ") if data else data)
    target = {"w": torch.zeros(4, 6)}
    with pytest.raises(CheckpointError, match=SHARD.replace(".", r"\.")):
        store.load(step, target)


@pytest.mark.parametrize(
    "text",
    [b"null", b"[]", b"{}", b'{"extra": 5}', b'{"extra": {}, "extra": {}}', b"[" * 50_000, b"\xff", b""],
)
def test_runs_that_lie(step: Path, text: bytes) -> None:
    set_file(step, "run.json", text)
    assert "run.json is not what megatune writes" in refusal(step)
    assert store.metric(step) is None


def test_a_start_passes_over_a_hostile_folder(step: Path) -> None:
    folder = step.parent
    state = {"w": torch.ones(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
    store.save(folder, 2, state, {}, Alone(), background=False)
    rewrite(folder / "step-000002", lambda d: chunk(d).update(file="../step-000001/" + SHARD))
    reasons: list[str] = []
    found = store.restore(folder, state, Alone(), reasons.append)
    assert found == (step, {"a": 1})
    assert "is not the name of a file in the folder" in reasons[0]
