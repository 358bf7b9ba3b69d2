"""Conversions that are cut, damaged, malicious or impossible; what they leave behind, and how much memory they take."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatune.checkpoint.convert import core, disk, formats, journal
from megatune.checkpoint.convert import hf as hf_format
from megatune.checkpoint.convert.core import DIGESTS, convert
from megatune.checkpoint.convert.digest import BLOCK_BYTES, BlockHashes, missing_blocks, whole_digest
from megatune.cli import commands
from megatune.errors import CheckpointError, ConfigError
from tests.helpers.tiny import make_llama

ROOT = Path(__file__).parents[2]


def test_a_killed_conversion_goes_on_and_another_source_is_refused(tmp_path: Path) -> None:
    source, out = make_llama(tmp_path / "source", layers=6, hidden=256, mlp=2048), tmp_path / "out"
    other = make_llama(tmp_path / "other", layers=6, hidden=256, mlp=2048, seed=1)
    # One part at a time, each with a pause, so that there is a middle to kill in.
    slow = (
        "import time\n"
        "from megatune.checkpoint.convert import hf\n"
        "from megatune.checkpoint.convert.core import convert\n"
        "hf.PART_BYTES = 1 << 20\n"
        "make = hf.HfTarget.make\n"
        "hf.HfTarget.make = lambda *words: (make(*words), time.sleep(0.15))\n"
        f"convert({str(source)!r}, {str(out)!r}, 'hf', workers=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT)
    written = tmp_path / ".out.converting/.megatune-journal.jsonl"
    deadline = time.monotonic() + 60
    while not (written.exists() and len(written.read_text().splitlines()) > 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(written.read_text().splitlines()) - 1
    assert not out.exists()
    with written.open("a") as file:
        file.write('{"job": "model.saf')  # a line that was cut
    # Parts of another size are other jobs: the same sizes here.
    before, hf_format.PART_BYTES = hf_format.PART_BYTES, 1 << 20
    try:
        with pytest.raises(CheckpointError, match="was begun there, and it was not this one"):
            convert(other, out, "hf", workers=1)
        result = convert(source, out, "hf", workers=1, verify=True)
    finally:
        hf_format.PART_BYTES = before
    assert result.resumed == done and result.verified
    expected = load_file(source / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    hidden = [item.name for item in (*tmp_path.iterdir(), *out.iterdir()) if item.name.startswith(".")]
    assert hidden == []


def test_workers_end_with_a_killed_conversion(tmp_path: Path) -> None:
    source, out = make_llama(tmp_path / "source"), tmp_path / "out"
    slow = (
        "import os, time\n"
        "from megatune.checkpoint.convert import pool\n"
        "from tests.formats.test_convert_core import Sleeper\n"
        "if __name__ == '__main__':\n"
        "    print(os.getpid(), flush=True)\n"
        "    for task, pid in pool.run(Sleeper(), [('pid',), ('pid',), ('sleep',), ('sleep',)], 2, print):\n"
        "        print(pid, flush=True)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(slow)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    parent, first, second = (int(process.stdout.readline()) for _ in range(3))
    assert len({parent, first, second}) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in (first, second)):
        assert time.monotonic() < deadline, "a worker lives on without the process that began the conversion"
        time.sleep(0.05)
    assert source.exists() and not out.exists()


class Sleeper:
    """Work that says who does it, or takes an hour."""

    def do(self, task, passed):
        if task == ("sleep",):
            time.sleep(3600)
        time.sleep(0.5)  # so that both workers get one
        return os.getpid()


class Failing:
    """Work that fails in ways of its own."""

    def do(self, task, passed):
        if task == ("user",):
            raise CheckpointError("x: is damaged; copy it again")
        if task == ("die",):
            os._exit(9)
        raise KeyError("a bug")


def test_errors_of_workers_reach_the_user() -> None:
    from megatune.checkpoint.convert.pool import run

    for task, kind, text in (
        ("user", CheckpointError, "x: is damaged; copy it again"),
        ("die", CheckpointError, "ended .exit code 9.*fewer --workers"),
        ("bug", RuntimeError, "KeyError"),
    ):
        with pytest.raises(kind, match=text):
            list(run(Failing(), [(task,), (task,)], 2, lambda count: None))


def test_several_processes_make_the_same_folder(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    convert(source, tmp_path / "one", "megatune", workers=1)
    result = convert(source, tmp_path / "two", "megatune", workers=2, verify=True)
    assert result.verified
    names = sorted(
        file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()
    )
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_llama(tmp_path / "source")
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--verify", "--dtype", "bf16"]
    assert run_verb(words) == 0
    out = capsys.readouterr().out
    assert "hf -> hf: 21 tensors" in out and "21 cast" in out and "every tensor read back and equal" in out
    assert run_verb([*words[:4], "nope"]) == 2
    assert "megatune: format 'nope' is not one of" in capsys.readouterr().err
    assert run_verb(["convert", str(tmp_path / "no"), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def run_verb(words: list[str]) -> int:
    """The exit code of a command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        commands(words)
    return end.value.code or 0


def test_a_damaged_destination_is_found(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    for to, file in (
        ("hf", "model.safetensors"),
        ("megatune", "checkpoints/step-000000/part-00000.safetensors"),
    ):
        out = tmp_path / to
        convert(source, out, to)
        assert convert(source, out, to, verify=True).verified
        whole = bytearray((out / file).read_bytes())
        whole[-1000] ^= 4
        (out / file).write_bytes(whole)
        with pytest.raises(
            CheckpointError, match="are not what was read from the source|is damaged between bytes"
        ):
            convert(source, out, to, verify=True)


def test_a_writer_that_gets_it_wrong_never_shows_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_llama(tmp_path / "source"), tmp_path / "out"
    real = hf_format.write_at
    monkeypatch.setattr(
        hf_format,
        "write_at",
        lambda fd, data, at: real(fd, memoryview(bytes(data)[::-1]) if at > 200_000 else data, at),
    )
    with pytest.raises(CheckpointError, match=r"of 21 tensors \(weights\) are not what was read"):
        convert(source, out, "hf", verify=True, workers=1)
    assert not out.exists()


def test_unmapped_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    cases = {
        "model.layers.0.self_attn.q_proj.lora_magic": weights
        | {"model.layers.0.self_attn.q_proj.lora_magic": torch.ones(3)},
        "model.layers.1.mlp.up_proj.weight": {k: v for k, v in weights.items() if "1.mlp.up_proj" not in k},
        "model.norm.weight": weights | {"model.norm.weight": torch.ones(63)},
    }
    for name, wrong in cases.items():
        save_file(wrong, source / "model.safetensors", metadata={"format": "pt"})
        for to in ("hf", "megatune"):
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                convert(source, tmp_path / "out", to)
            assert not (tmp_path / "out").exists()


def test_malicious_folders_are_refused(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    secret = tmp_path / "secret.safetensors"
    (source / "model.safetensors").rename(secret)
    index = source / "model.safetensors.index.json"
    for file in ("../secret.safetensors", str(secret), "..", "a/../../secret.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
            convert(source, tmp_path / "out", "hf")
    index.unlink()
    bins = source / "pytorch_model.bin.index.json"
    bins.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.bin"}}))
    with pytest.raises(CheckpointError, match=r"no \.bin file of this folder"):
        convert(source, tmp_path / "out", "hf")
    bins.unlink()
    # Headers that promise what the file does not have; a terabyte that is not there.
    for entry in (
        {"shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"shape": [-4], "data_offsets": [0, 16]},
    ):
        text = json.dumps({"model.norm.weight": {"dtype": "F32", **entry}}).encode()
        (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            convert(source, tmp_path / "out", "hf")
    (source / "model.safetensors").unlink()
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    torch.save({"model.norm.weight": Bomb()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", "hf")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_what_cannot_be_converted_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_llama(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt.*looked for gguf:.*hf: config\.json"):
        convert(tmp_path / "empty", tmp_path / "out", "hf")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(tmp_path / "nothing", tmp_path / "out", "hf")
    with pytest.raises(ConfigError, match=r"'onnx' is not one of .*hf"):
        convert(source, tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match="GGUF file can only be read; choose .*megatune"):
        convert(source, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="lies in the source"):
        convert(source, source / "out", "hf")
    with pytest.raises(CheckpointError, match="is there already and holds something else"):
        convert(source, tmp_path / "empty", "hf")
    with pytest.raises(CheckpointError, match="it is a whole model; choose --to hf"):
        convert(source, tmp_path / "out", "peft")
    monkeypatch.setattr(core.shutil, "disk_usage", lambda path: os.statvfs_result and _Usage())
    with pytest.raises(CheckpointError, match=r"has 0\.00 GiB free and the conversion writes"):
        convert(source, tmp_path / "out", "hf")


class _Usage:
    free = 1000


def test_a_second_conversion_to_one_folder_waits_for_the_first(tmp_path: Path) -> None:
    source, out = make_llama(tmp_path / "source"), tmp_path / "out"
    first = journal.Journal(out, "other", "somewhere")
    with pytest.raises(CheckpointError, match="another process is converting to it"):
        convert(source, out, "hf")
    first.remove()
    assert convert(source, out, "hf").tensors == 21


def test_every_format_is_listed_and_detects_only_its_own(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    convert(source, tmp_path / "ours", "megatune")
    assert {"hf", "megatune", "peft"} <= set(formats.targets()) and "gguf" in formats.names()
    for name in formats.names():
        one = formats.named(name)
        assert one.name == name
        assert one.detect(source) == (name == "hf")
        assert one.detect(tmp_path / "ours") == (name == "megatune")
        assert not one.detect(tmp_path) and not one.detect(source / "config.json")
        assert not one.detect(tmp_path / "nothing")


@pytest.mark.parametrize("size", [1, 7, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES - 5])
def test_a_digest_does_not_depend_on_who_saw_which_part(size: int) -> None:
    data = memoryview(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy())
    one = BlockHashes(size)
    one.add(0, data)
    assert missing_blocks(size, one.found) == []
    expected = whole_digest(size, one.found)
    generator = torch.Generator().manual_seed(size)
    cuts = sorted({0, size, *torch.randint(0, size + 1, (5,), generator=generator).tolist()})
    runs = list(pairwise(cuts))
    in_order = BlockHashes(size)
    for start, stop in runs:
        in_order.add(start, data[start:stop])
    assert whole_digest(size, in_order.found) == expected
    backwards = BlockHashes(size)
    for start, stop in reversed(runs):
        backwards.add(start, data[start:stop])
    for number in missing_blocks(size, backwards.found):
        first = number * BLOCK_BYTES
        backwards.add(first, data[first : min(size, first + BLOCK_BYTES)])
    assert whole_digest(size, backwards.found) == expected
    if size > 1:
        changed = bytearray(data)
        changed[size // 2] ^= 1
        other = BlockHashes(size)
        other.add(0, memoryview(changed))
        assert whole_digest(size, other.found) != expected


def test_the_next_portion_is_made_while_one_is_used_unless_it_is_large() -> None:
    made: list[int] = []
    second = threading.Event()

    def portions(size: int) -> Iterator[bytes]:
        for number in range(3):
            made.append(number)
            if number == 1:
                second.set()
            yield bytes(size)

    for number, _ in enumerate(disk.ahead(portions(1), len)):
        if number == 0:
            assert second.wait(30)  # the second is made though nobody asked for it yet
    assert made == [0, 1, 2]
    made.clear()
    for number, _ in enumerate(disk.ahead(portions(40 << 20), len)):
        time.sleep(0.02)
        assert made == list(range(number + 1))

    def broken() -> Iterator[bytes]:
        yield b"x"
        raise CheckpointError("is damaged")

    with pytest.raises(CheckpointError, match="is damaged"):
        list(disk.ahead(broken(), len))


def test_a_part_counts_once_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_llama(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(hf_format, "PART_BYTES", 1 << 14)
    real, journalled = disk.sync_file, []

    def count_lines() -> int:
        return len((tmp_path / ".out.converting/.megatune-journal.jsonl").read_text().splitlines()) - 1

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    def sync(path: Path) -> None:
        assert path.name == "model.safetensors"
        journalled.append(count_lines())
        time.sleep(0.1)  # other parts are written meanwhile, and synced all together
        real(path)

    monkeypatch.setattr(disk, "sync_file", fail)
    with pytest.raises(CheckpointError, match="model.safetensors: Input/output error; run the same command"):
        convert(source, out, "hf", workers=1)
    assert not out.exists() and count_lines() == 0
    monkeypatch.setattr(disk, "sync_file", sync)
    result = convert(source, out, "hf", workers=1, verify=True)
    assert result.verified and result.resumed == 0
    assert journalled[0] == 0 and journalled == sorted(journalled)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak memory over what the imports take, for weights of more than 10 times the largest tensor: there, back, and
    both read again to be verified."""
    source = make_llama(tmp_path / "source", layers=16, hidden=512, mlp=2048, vocab_size=8192)
    total, largest = (source / "model.safetensors").stat().st_size, 8192 * 512 * 4
    assert total > 14 * largest
    code = (
        "import resource, sys\n"
        "from megatune.checkpoint.convert.core import convert\n"
        "from megatune.checkpoint.convert import hf, megatune_run, pickles\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before, (source, ours, back) = peak(), sys.argv[1:]\n"
        "convert(source, ours, 'megatune', workers=1, verify=True)\n"
        "convert(ours, back, 'hf', workers=1, verify=True)\n"
        "print(peak() - before)\n"
    )
    words = [sys.executable, "-c", code, str(source), str(tmp_path / "ours"), str(tmp_path / "back")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    assert grown < 2 * largest + (80 << 20) < total / 2, f"{grown / 2**20:.0f} MiB"
    assert (tmp_path / "back" / DIGESTS).is_file()
