"""Folders made to harm whoever opens them, in every format: nothing is run, little memory is taken, one error said.

Each attack is a change of a good checkpoint, converted by the command line's own verb in a process that may take no
more than another GiB of memory and 20 seconds. A file that was run would leave a canary behind.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megatune.checkpoint.convert import core
from megatune.checkpoint.convert.base import Options
from tests.helpers.deepspeed_files import Case, write, write_universal
from tests.helpers.tiny import make_llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*__module__.*")

_CHILD = """
import faulthandler, json, os, resource, sys
os.environ["MEGATUNE_CACHE"] = sys.argv[1]
import torch
from click.testing import CliRunner
import megatune.checkpoint.convert.core
from megatune.cli import commands
for module in ("bin_files", "dcp", "deepspeed", "hf", "megatron_legacy", "megatune_run", "torch_dist", "gguf", "peft"):
    __import__("megatune.checkpoint.convert." + module)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for line in sys.stdin:
    source, target, like = json.loads(line)
    faulthandler.dump_traceback_later(20, exit=True)
    words = ["convert", source, target, "--to", "hf", "--workers", "1", "--like", like]
    found = CliRunner().invoke(commands, words)
    wrong = repr(found.exception) if found.exception and not isinstance(found.exception, SystemExit) else None
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps([found.exit_code, found.output, wrong]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What the verb did with one folder: `wrong`: an exception that reached nobody."""

    code: int
    output: str
    wrong: str | None

    def is_an_error(self) -> bool:
        return self.code == 2 and self.wrong is None and "Traceback" not in self.output

    def is_harmless(self) -> bool:
        return self.wrong is None and self.code in (0, 2)


class Victim:
    """A process that opens what it is given."""

    def __init__(self, folder: Path, like: Path) -> None:
        self.canary = folder / "canary"
        self._folder, self._like, self._count = folder, like, 0
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _CHILD, str(self._folder / "cache")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def opens(self, path: Path) -> Outcome:
        if self._process is None:
            self._process = self._start()
        self._count += 1
        target = self._folder / "made" / str(self._count)
        self._process.stdin.write(json.dumps([str(path), str(target), str(self._like)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code, self._process = self._process.wait(), None
            raise AssertionError(f"{path}: the process died ({code}) or took too long")
        assert not self.canary.exists(), f"{path}: something in it was run"
        shutil.rmtree(target, ignore_errors=True)
        return Outcome(*json.loads(line))

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(30)


def _shard(folder: Path) -> Path:
    """A Hugging Face folder in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _bin(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _peft(folder: Path, base: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    config |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 16), name.format("B"): torch.ones(16, 2)},
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malicious")


@pytest.fixture(scope="module")
def hf(root: Path) -> Path:
    return make_llama(root / "hf", hidden=16, heads=2, kv_heads=1, mlp=24, layers=1)


@pytest.fixture(scope="module")
def good(root: Path, hf: Path) -> dict[str, Path]:
    """A good checkpoint of each format."""
    masters = load_file(hf / "model.safetensors")
    states = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), masters)
    found = {"hf": hf, "sharded": _shard(shutil.copytree(hf, root / "sharded"))}
    found["bin"] = _bin(shutil.copytree(hf, root / "bin"))
    found["peft"] = _peft(root / "peft", hf)
    for kind, options in (
        ("megatron", Options(tensor=2)),
        ("torch_dist", Options()),
        ("megatune", Options()),
    ):
        core.convert(hf, root / kind, kind, options)
        found[kind] = root / kind
    dcp.save(dict(masters), checkpoint_id=root / "dcp", no_dist=True)
    found["dcp"] = root / "dcp"
    for name, stage in (("zero2", 2), ("zero3", 3)):
        write(root / name, states, Case(stage))
        found[name] = root / name
    write_universal(root / "universal", states, Case(2))
    shutil.rmtree(root / "universal" / "source")
    found["universal"] = root / "universal"
    return found


WITHOUT_PICKLES = ("hf", "sharded", "peft", "megatune")
KINDS = (*WITHOUT_PICKLES, "bin", "megatron", "torch_dist", "dcp", "zero2", "zero3", "universal")


@pytest.fixture(scope="module")
def victim(root: Path, hf: Path) -> Iterator[Victim]:
    found = Victim(root, hf)
    yield found
    found.close()


@pytest.fixture
def copy(tmp_path: Path, good: dict[str, Path]) -> Callable[[str], Path]:
    """A fresh copy of a good checkpoint."""
    count = iter(range(10**6))
    return lambda kind: shutil.copytree(good[kind], tmp_path / f"{kind}-{next(count)}")


def _files(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def _is_zip(path: Path) -> bool:
    return path.read_bytes()[:4] == b"PK\x03\x04"


def _is_pickle(path: Path) -> bool:
    return path.read_bytes()[:1] == b"\x80" and path.suffix not in (".safetensors", ".json")


class _Touch:
    def __init__(self, canary: Path) -> None:
        self._line = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._line,)


def _loaded(stream: bytes, canary: Path) -> bytes:
    """The same pickle, which first calls os.system and drops what it returns."""
    line = f"touch {canary}".encode()
    call = b"cposix\nsystem\n(X" + struct.pack("<I", len(line)) + line + b"tR0"
    assert stream[:1] == b"\x80"
    return stream[:2] + call + stream[2:]


def _rezip(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in members.items():
            target.writestr(name, change(name, data))


def test_good_folders_convert(victim: Victim, good: dict[str, Path]) -> None:
    """Otherwise errors below would prove nothing."""
    assert set(KINDS) == good.keys()
    for kind, path in good.items():
        outcome = victim.opens(path)
        assert outcome.code == 0, (kind, outcome)


def test_the_bombs_would_go_off(tmp_path: Path) -> None:
    """Opened as these files usually are, they run."""
    stream = _loaded(pickle.dumps({"a": 1}, 2), tmp_path / "canary")
    assert pickle.loads(stream) == {"a": 1} and (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_in_every_pickle(
    kind: str, victim: Victim, copy: Callable[[str], Path], good: dict[str, Path]
) -> None:
    """Before what the file holds, within it, and instead of it."""
    attacked = 0
    for file in {file.name: file for file in _files(good[kind])}.values():  # one of each name
        path = good[kind] / file
        # Nobody needs them: the rest of universal checkpoints, other ranks' models where nothing is frozen.
        unread = path.name == "optimizer_state.pt" or path.name.startswith("zero_pp_rank_1_mp_rank_00_model")
        if _is_zip(path):
            folder = copy(kind)
            if path.suffix == ".distcp":  # many archives in one file, each with its place in the index
                data = (folder / file).read_bytes()
                name = data.index(b"cOrderedDict") if b"cOrderedDict" in data else data.index(b"torch._utils")
                (folder / file).write_bytes(data[:name] + b"posix\nsystem" + data[name + 12 :])
            else:
                _rezip(folder / file, lambda n, d: _loaded(d, victim.canary) if n.endswith("data.pkl") else d)
            outcome = victim.opens(folder)
            assert unread or outcome.is_an_error(), (file, outcome)
        elif _is_pickle(path):
            folder = copy(kind)
            (folder / file).write_bytes(_loaded((folder / file).read_bytes(), victim.canary))
            assert (outcome := victim.opens(folder)).is_an_error(), (file, outcome)
        else:
            continue
        attacked += 1
        for how in ("zip", "old", "raw"):
            folder = copy(kind)
            if how == "raw" or path.name == ".metadata":  # torch writes no archive under that name
                (folder / file).write_bytes(pickle.dumps(_Touch(victim.canary)))
            else:
                torch.save(_Touch(victim.canary), folder / file, _use_new_zipfile_serialization=how == "zip")
            outcome = victim.opens(folder)
            assert unread or outcome.is_an_error(), (file, how, outcome)
    assert attacked > 0 or kind in WITHOUT_PICKLES


# Files that some program or other opens with pickle.
HIDING = [
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
    "common.pt",
    "tokenizer.pkl",
    "tokenizer.model",
    "adapter_model.bin",
    "distrib_optim.pt",
    "model.pt",
    ".metadata",
    "state.pickle",
    "sitecustomize.py",
    "modeling_llama.py",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_where_pickles_hide(kind: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    for place in {folder, *(file.parent for file in folder.rglob("*") if file.is_file())}:
        for name in HIDING:
            if (place / name).exists():
                continue
            if name.endswith(".py"):
                (place / name).write_text(f"open({str(victim.canary)!r}, 'w')\n")
            else:
                (place / name).write_bytes(pickle.dumps(_Touch(victim.canary)))
    assert victim.opens(folder).is_harmless()


def test_a_config_that_asks_for_code(victim: Victim, copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(victim.canary)!r}, 'w')\n")
    assert victim.opens(folder).is_harmless()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*WITHOUT_PICKLES, "dcp")])
def test_zip_bombs(kind: str, victim: Victim, copy: Callable[[str], Path], good: dict[str, Path]) -> None:
    """A compressed member of gigabytes of zeros; and a member that says that it is so large."""
    file = next(
        f
        for f in _files(good[kind])
        if _is_zip(good[kind] / f) and f.suffix != ".distcp" and "optimizer" not in str(f)
    )
    folder = copy(kind)
    _rezip(folder / file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with (
        zipfile.ZipFile(folder / file, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x/data/999", "w") as member,
    ):
        for _ in range(300 if kind == "bin" else 2):
            member.write(bytes(1 << 20))
    outcome = victim.opens(folder)
    assert outcome.is_an_error() and "compressed" in outcome.output, outcome
    folder = copy(kind)
    data = bytearray((folder / file).read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    (folder / file).write_bytes(data)
    outcome = victim.opens(folder)
    assert outcome.is_an_error(), outcome


@pytest.mark.parametrize("kind", ["dcp", "torch_dist"])
def test_a_zip_bomb_in_a_chunk(kind: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    """One chunk of a tensor is a compressed archive in a file of its own."""
    folder = copy(kind)
    path = next(folder.rglob(".metadata"))
    metadata = pickle.loads(path.read_bytes())
    index = next(one for one in metadata.storage_data if "embed" in one.fqn)
    bomb = path.parent / "bomb.distcp"
    tensors = metadata.state_dict_metadata[index.fqn]
    torch.save(torch.zeros(tensors.chunks[0].sizes, dtype=tensors.properties.dtype), bomb)
    _rezip(bomb, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(bomb, "a") as archive:
        archive.writestr("x/size", bytes(1 << 16))  # as large as the index wants
    place = metadata.storage_data[index]
    metadata.storage_data[index] = type(place)(bomb.name, 0, bomb.stat().st_size)
    path.write_bytes(pickle.dumps(metadata))
    outcome = victim.opens(folder)
    assert outcome.is_an_error() and "compressed" in outcome.output, outcome


def test_an_adapter_in_a_pickle(victim: Victim, copy: Callable[[str], Path]) -> None:
    folder = copy("peft")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Touch(victim.canary)))
    assert (outcome := victim.opens(folder)).is_an_error(), outcome


@pytest.mark.parametrize("kind", ["hf", "sharded", "peft", "megatune", "torch_dist"])
def test_nesting_without_end(kind: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    """In every JSON that is read, the headers of safetensors too."""
    folder = copy(kind)
    deep = '{"a":' * 100_000
    for file in _files(folder):
        whole = (folder / file).read_bytes()
        if file.suffix == ".json" and "token" not in file.name and "digests" not in file.name:
            (folder / file).write_text(deep)
        elif file.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", whole[:8])
            text = deep.encode()
            (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        else:
            continue
        outcome = victim.opens(folder)
        # The model is that of --like; generation settings are copied as they are.
        unread = file.name == "generation_config.json" or (kind, file.name) == ("torch_dist", "config.json")
        assert outcome.is_an_error() or (unread and outcome.is_harmless()), (file, outcome)
        (folder / file).write_bytes(whole)


def _values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number and string of a JSON value, with its place; of long lists the first two."""
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from _values(value[key], (*path, key))
    elif isinstance(value, list):
        for number, one in enumerate(value[:2]):
            yield from _values(one, (*path, number))
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield path, value


def _with(text: str, path: tuple[Any, ...], value: Any) -> str:
    whole = json.loads(text)
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(whole)


ABSURD = [1 << 50, -1, "../../../../etc/passwd", 1e300, None]


@pytest.mark.parametrize("kind", ["sharded", "megatune", "peft", "torch_dist"])
def test_absurd_values_in_every_json(kind: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    """Numbers that would need all memory there is, and paths that leave the folder. Not all are errors (a rotary base
    may be anything), but none may do harm."""
    folder = copy(kind)
    tried = 0
    wanted = int(os.environ.get("MEGATUNE_FUZZ", "40"))
    for file in [
        f for f in _files(folder) if f.suffix == ".json" and "token" not in f.name and "digests" not in f.name
    ]:
        text = (folder / file).read_text()
        places = list(_values(json.loads(text)))
        step = max(1, len(places) // wanted)
        for number, (path, _) in enumerate(places[::step]):
            for absurd in ABSURD if wanted > 40 else (ABSURD[number % len(ABSURD)],):
                (folder / file).write_text(_with(text, path, absurd))
                outcome = victim.opens(folder)
                assert outcome.is_harmless(), (file, path, absurd, outcome)
                tried += 1
        (folder / file).write_text(text)
    assert tried > 5
    assert victim.opens(folder).code == 0


WIDTHS = ("hidden_size", "intermediate_size", "head_dim")
SIZES = (*WIDTHS, "num_hidden_layers", "vocab_size", "num_attention_heads")


@pytest.mark.parametrize("key", SIZES)
def test_absurd_sizes_of_a_model(key: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    text = (folder / "config.json").read_text()
    for size in (10**9, 1 << 50):
        (folder / "config.json").write_text(_with(text, (key,), size))
        outcome = victim.opens(folder)
        assert outcome.is_an_error(), (size, outcome)


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "", "\x00", "x\\..\\y"]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_paths_stay_in_the_folder(outside: str, victim: Victim, copy: Callable[[str], Path]) -> None:
    secret = copy("sharded")
    shutil.copy(next(secret.glob("*.safetensors")), secret.parent / "secret.safetensors")
    folder = copy("sharded")
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, outside)}))
    assert (outcome := victim.opens(folder)).is_an_error(), outcome
    folder = copy("bin")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, outside)})
    )
    assert (outcome := victim.opens(folder)).is_an_error(), outcome
    folder = copy("megatune")
    manifest = next(folder.rglob("manifest.json"))
    name = next(manifest.parent.glob("*.safetensors")).name
    assert f'"{name}"' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(f'"{name}"', json.dumps(outside)))
    assert (outcome := victim.opens(folder)).is_an_error(), outcome
    for kind in ("zero2", "universal"):
        folder = copy(kind)
        next(folder.glob("latest*")).write_text(outside)
        assert (outcome := victim.opens(folder)).is_an_error(), outcome
    for kind in ("megatron", "torch_dist"):
        folder = copy(kind)
        (folder / "latest_checkpointed_iteration.txt").write_text(outside)
        assert (outcome := victim.opens(folder)).is_harmless(), outcome


@pytest.mark.parametrize(
    "shape", [[1 << 40, 1 << 20], [1 << 62, 1 << 62], [-1, 4], [0, 1 << 62], [[1]], ["2"], []]
)
def test_absurd_shapes_in_safetensors(shape: list[Any], victim: Victim, copy: Callable[[str], Path]) -> None:
    for kind, pattern in (
        ("hf", "model.safetensors"),
        ("megatune", "*.safetensors"),
        ("peft", "*.safetensors"),
    ):
        folder = copy(kind)
        file = next(folder.rglob(pattern))
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header[next(name for name in header if name != "__metadata__")]["shape"] = shape
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        assert (outcome := victim.opens(folder)).is_an_error(), outcome
    huge = copy("hf")
    (huge / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert victim.opens(huge).is_an_error()


def test_absurd_shapes_in_torch_files(victim: Victim, copy: Callable[[str], Path]) -> None:
    """A tensor of terabytes over a storage of one value: strides of zero."""
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    folder = copy("bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save(dict.fromkeys(tensors, huge), folder / "pytorch_model.bin")
    assert (outcome := victim.opens(folder)).is_an_error(), outcome
    folder = copy("universal")
    file = next(folder.rglob("fp32.pt"))
    torch.save({"param": huge}, file)
    assert (outcome := victim.opens(folder)).is_an_error(), outcome


@pytest.mark.parametrize("what", ["tensors", "values", "text", "cut", "array"])
def test_gguf(what: str, victim: Victim, tmp_path: Path) -> None:
    """Counts and lengths that the file does not have."""
    many = (1 << 62).to_bytes(8, "little")
    one = (1).to_bytes(8, "little")
    key = one + b"k"
    body = {
        "tensors": many + bytes(8),
        "values": bytes(8) + many,
        "text": bytes(8) + one + many,
        "cut": bytes(4),
        "array": bytes(8) + one + key + struct.pack("<II", 9, 4) + many,
    }[what]
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    assert (outcome := victim.opens(file)).is_an_error(), outcome


def test_random_damage_of_every_file(victim: Victim, copy: Callable[[str], Path]) -> None:
    """Bytes changed at random places, mostly in headers: an error or a conversion, never a crash or a file run."""
    generator = torch.Generator().manual_seed(int(os.environ.get("MEGATUNE_SEED", "0")))

    def draw(stop: int) -> int:
        return int(torch.randint(0, stop, (), generator=generator))

    rounds = max(1, int(os.environ.get("MEGATUNE_FUZZ", "40")) // 40)
    for kind in KINDS:
        folder = copy(kind)
        for file in _files(folder) * rounds:
            if "token" in file.name or "digests" in file.name:
                continue
            whole = (folder / file).read_bytes()
            data = bytearray(whole)
            for _ in range(1 + draw(6)):
                if data:
                    data[draw(min(len(data), 4000))] = draw(256)
            (folder / file).write_bytes(data[: draw(len(data) + 1)] if draw(4) == 0 else data)
            assert (outcome := victim.opens(folder)).is_harmless(), (kind, file, outcome)
            (folder / file).write_bytes(whole)


def test_links_that_leave_the_folder_are_not_written_through(
    victim: Victim, copy: Callable[[str], Path]
) -> None:
    """`latest` of DeepSpeed as a link, and a step that is one: at most an error, the target is not touched."""
    folder = copy("zero2")
    secret = folder.parent / "secret"
    secret.write_text("global_step7")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(secret)
    assert victim.opens(folder).is_harmless()
    assert secret.read_text() == "global_step7"


def test_a_nested_archive_is_no_way_in(victim: Victim, copy: Callable[[str], Path]) -> None:
    """Bytes within bytes (as torch_dist's extra states are) are not opened."""
    inner = io.BytesIO()
    torch.save(_Touch(victim.canary), inner)
    folder = copy("bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save({**tensors, "extra": inner.getvalue()}, folder / "pytorch_model.bin")
    assert (outcome := victim.opens(folder)).is_an_error(), outcome
