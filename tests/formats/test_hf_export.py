"""Export as a Hugging Face folder: every family, shards, dtypes, sharded models, and places that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatune import adapters
from megatune.checkpoint import export_hf, hf, hf_tensors, load_pretrained, resolve_model
from megatune.checkpoint.safetensors_file import SafetensorsWriter
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError
from megatune.models import build
from tests.helpers.dist import run_ranks
from tests.helpers.families import CASES, documents, pair


def _load(folder: Path, method: LoraMethod | None = None):
    source = resolve_model(str(folder))
    model = build(source.spec)
    if method is not None:
        adapters.attach(model, method)
    load_pretrained(model, source, device="cpu")
    return model, source


def _logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return hf_model(tokens[None]).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 30_000)
    pair(name).hf.save_pretrained(tmp_path / "source")
    ours, source = _load(tmp_path / "source")
    export_hf(ours, tmp_path / "out", source=source, merge=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and set(files) == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in ours.parameters())
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        expected = ours(tokens, segments)
    torch.testing.assert_close(_logits(tmp_path / "out", tokens), expected, rtol=1e-5, atol=1e-5)


def test_the_same_bits_and_all_files_come_out(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    export_hf(model, tmp_path / "deep/out", source=source, merge=False)
    out = tmp_path / "deep/out"
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {file.name for file in out.iterdir()} == {file.name for file in tiny_llama.iterdir()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        first, second = (json.loads((folder / name).read_text()) for folder in (tiny_llama, out))
        assert first == second, name
    text = "Where is the owl?"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tiny_llama)(text)
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing temporary is left


def test_a_model_without_a_source_folder(tmp_path: Path) -> None:
    ours = pair("qwen3").ours
    export_hf(ours, tmp_path / "out", source=None, merge=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            _logits(tmp_path / "out", tokens), ours(tokens, segments), rtol=1e-5, atol=1e-5
        )


def test_dtype_of_the_export(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    export_hf(model, tmp_path / "out", source=source, merge=False, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, load_file(tiny_llama / "model.safetensors")[name].bfloat16())


def test_an_earlier_export_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    out = tmp_path / "out"
    export_hf(model, out, source=source, merge=False)
    (out / "stale.txt").touch()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    export_hf(model, out, source=source, merge=False)
    assert load_file(out / "model.safetensors")["model.norm.weight"].eq(2.0).all()
    assert not (out / "stale.txt").exists()


def test_places_that_must_not_be_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mother.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="letters: is there and is no model folder"):
        export_hf(model, tmp_path / "letters", source=source, merge=False)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is there and is no model folder"):
        export_hf(model, tmp_path / "file", source=source, merge=False)
    with pytest.raises(CheckpointError, match="is the folder that the model comes from"):
        export_hf(model, tiny_llama, source=source, merge=False)
    assert (tmp_path / "letters/mother.txt").read_text() == "dear"


def test_low_level_iteration_holds_one_tensor(tiny_llama: Path) -> None:
    model, _ = _load(tiny_llama)
    expected = load_file(tiny_llama / "model.safetensors")
    found = {
        name: tuple(tensor.shape) for name, tensor in hf_tensors(model, merge=False, dtype=torch.float32)
    }
    assert found == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def _export_sharded(rank: int, world_size: int, folder: Path, out: Path) -> str:
    source = resolve_model(str(folder))
    model = build(source.spec)
    adapters.attach(model, LoraMethod(type="lora", rank=2))
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_pretrained(model, source, device="cpu")
    export_hf(model, out / "base", source=source, merge=False)  # before any forward pass
    _set_adapters(model)
    tokens, segments, _ = documents((5,), source.spec.vocab_size)
    with torch.no_grad():
        model(tokens, segments)  # leaves the root unsharded
    export_hf(model, out / "merged", source=source, merge=True)
    if rank == 0:
        SafetensorsWriter.write = _no_space
    try:
        export_hf(model, out / "full-disk", source=source, merge=False)
    except CheckpointError as error:
        return str(error)
    return ""


def _no_space(self, name, tensor):
    raise OSError(28, "No space left on device")


def _set_adapters(model) -> None:
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if ".adapter." in name:
                parameter.fill_(0.01 * (index % 7 - 3))


def test_export_of_a_sharded_model(tiny_llama: Path, tmp_path: Path) -> None:
    errors = run_ranks(_export_sharded, 2, tiny_llama, tmp_path)
    assert errors == [f"{tmp_path}/full-disk: cannot be written (No space left on device)"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]
    base = load_file(tiny_llama / "model.safetensors")
    for name, tensor in load_file(tmp_path / "base/model.safetensors").items():
        assert torch.equal(tensor, base[name])
    model, _ = _load(tiny_llama, LoraMethod(type="lora", rank=2))
    _set_adapters(model)
    tokens, segments, _ = documents((9,), model.spec.vocab_size)
    with torch.no_grad():
        expected = model(tokens, segments)
        plain, _ = _load(tiny_llama)
        assert (expected - plain(tokens, segments)).abs().max() > 0.01  # the adapters do something
    torch.testing.assert_close(_logits(tmp_path / "merged", tokens), expected, rtol=1e-5, atol=1e-5)
