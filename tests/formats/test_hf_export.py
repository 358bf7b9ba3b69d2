"""Export as a Hugging Face folder: every family, shards, dtypes, layouts, and places that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatune import adapters
from megatune.checkpoint import collect, export_hf, export_peft, hf, load_pretrained, resolve_model
from megatune.checkpoint.collect import Collected, offer_of
from megatune.checkpoint.safetensors_file import SafetensorsWriter
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError
from megatune.models import build, whole_weights
from tests.helpers.dist import run_ranks
from tests.helpers.families import CASES, documents, hf_model, pair
from tests.helpers.parts import held, shards, values_of, worlds
from tests.helpers.tiny import make_llama


def _load(folder: Path, method: LoraMethod | None = None):
    source = resolve_model(str(folder))
    model = build(source.spec)
    if method is not None:
        adapters.attach(model, method)
    load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source)
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
    export_hf(whole_weights(ours), ours, tmp_path / "out", source=source, merge=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and set(files) == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in ours.state_dict().values())
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        expected = ours(tokens, segments)
    torch.testing.assert_close(_logits(tmp_path / "out", tokens), expected, rtol=1e-5, atol=1e-5)


def test_the_same_bits_and_all_files_come_out(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    export_hf(whole_weights(model), model, tmp_path / "deep/out", source=source, merge=False)
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
    export_hf(whole_weights(ours), ours, tmp_path / "out", source=None, merge=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            _logits(tmp_path / "out", tokens), ours(tokens, segments), rtol=1e-5, atol=1e-5
        )


def test_dtype_of_the_export(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    export_hf(whole_weights(model), model, tmp_path / "out", source=source, merge=False, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, load_file(tiny_llama / "model.safetensors")[name].bfloat16())


def test_an_earlier_export_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    out = tmp_path / "out"
    export_hf(whole_weights(model), model, out, source=source, merge=False)
    (out / "stale.txt").touch()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    export_hf(whole_weights(model), model, out, source=source, merge=False)
    assert load_file(out / "model.safetensors")["model.norm.weight"].eq(2.0).all()
    assert not (out / "stale.txt").exists()


def test_places_that_must_not_be_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model, source = _load(tiny_llama)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mother.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="letters: is there and is no model folder"):
        export_hf(whole_weights(model), model, tmp_path / "letters", source=source, merge=False)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: is there and is no model folder"):
        export_hf(whole_weights(model), model, tmp_path / "file", source=source, merge=False)
    with pytest.raises(CheckpointError, match="is the folder that the model comes from"):
        export_hf(whole_weights(model), model, tiny_llama, source=source, merge=False)
    assert (tmp_path / "letters/mother.txt").read_text() == "dear"


def test_one_tensor_is_in_memory_at_a_time(tiny_llama: Path) -> None:
    model, _ = _load(tiny_llama)
    weights = whole_weights(model)
    found = hf.hf_tensors(Collected(weights, [offer_of(weights)]), model, merge=False, dtype=torch.float32)
    expected = load_file(tiny_llama / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in found} == {n: tuple(t.shape) for n, t in expected.items()}


LAYOUTS = {
    2: {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp_replicate": 2}, "ep2": {"dp_shard": 2, "ep": 2}},
    4: {
        "tp4": {"tp": 4},
        "tp2-pp2": {"tp": 2, "pp": 2},
        "fsdp4": {"dp_shard": 2, "cp": 2},
        "tp2-ep2": {"tp": 2, "dp_shard": 2, "ep": 2, "etp": 2},
    },
}
METHOD = LoraMethod(type="lora", rank=3)


def _export_cut(rank: int, world_size: int, bases: Path, out: Path) -> list[str]:
    """Exports under layouts of this many processes; what cannot be written is said by all."""
    errors = []
    for name, sizes in LAYOUTS[world_size].items():
        world = worlds(**sizes)[rank]
        model, source = _whole(bases / _base_of(name))
        specs = held(model.shard_specs(), world, model.spec.num_layers)
        weights, target = shards(specs, world, _values(source)), out / name
        _export_all(weights, model, source, target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collect, "QUIET_SECONDS", 0.0)  # the others hear something after each tensor
            if rank == 0:
                patch.setattr(SafetensorsWriter, "write", _no_space)
            for kept, place in ((weights, "full"), (_without(weights, rank), "part")):
                try:
                    export_hf(kept, model, target / place, source=None, merge=False)
                except CheckpointError as error:
                    errors.append(str(error))
    return errors


def _base_of(layout: str) -> str:
    return "mixtral" if "ep" in layout else "llama"


def _whole(folder: Path):
    source = resolve_model(str(folder))
    model = build(source.spec)
    adapters.attach(model, METHOD)
    return model, source


def _export_all(weights, model, source, target: Path) -> None:
    export_hf(weights, model, target / "model", source=source, merge=False)
    export_hf(weights, model, target / "merged", source=source, merge=True, dtype=torch.bfloat16)
    export_peft(weights, model, target / "adapter", method=METHOD, base_path="base")


def _values(source) -> dict[str, torch.Tensor]:
    """The folder's weights and random adapters, by our names."""
    model = build(source.spec)
    adapters.attach(model, METHOD)
    weights = whole_weights(model.to_empty(device="cpu"))
    load_pretrained(weights, source.spec, source)
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.1 * torch.randn(value.shape, generator=generator) if ".adapter." in name else value
        for name, value in values_of(model).items()
    }


def _without(weights, rank: int):
    """The last process lacks a tensor that it should write."""
    last = [
        name for name, parts in weights.items() if parts.writes and parts.parts and ".adapter." not in name
    ][-1:]
    return {name: parts for name, parts in weights.items() if rank == 0 or name not in last}


def _no_space(self, name, tensor):
    if name.endswith("norm.weight"):
        raise OSError(28, "No space left on device")


def test_every_layout_writes_the_same_bytes(tmp_path: Path) -> None:
    """Weights that nothing divides, tied, fewer KV heads than processes; experts; tensor, pipeline, expert parallelism
    and ZeRO."""
    make_llama(tmp_path / "base/llama", vocab_size=319, mlp=132, layers=3, tied=True)
    hf_model("mixtral").save_pretrained(tmp_path / "base/mixtral")
    expected = {}
    for name in ("llama", "mixtral"):
        model, source = _whole(tmp_path / "base" / name)
        values = _values(source)
        _export_all(shards(model.shard_specs(), worlds()[0], values), model, source, tmp_path / "1" / name)
        expected[name] = {
            what: _files(tmp_path / "1" / name / what) for what in ("model", "merged", "adapter")
        }
        base = load_file(tmp_path / "base" / name / "model.safetensors")
        for key, tensor in load_file(tmp_path / "1" / name / "model/model.safetensors").items():
            assert torch.equal(tensor, base[key])
        assert expected[name]["merged"]["model.safetensors"] != expected[name]["model"]["model.safetensors"]
    for world_size, layouts in LAYOUTS.items():
        errors = run_ranks(_export_cut, world_size, tmp_path / "base", tmp_path / str(world_size))
        assert all(found == errors[0] for found in errors)
        assert len(errors[0]) == 2 * len(layouts)
        for number, name in enumerate(layouts):
            place = tmp_path / str(world_size) / name
            assert sorted(path.name for path in place.iterdir()) == ["adapter", "merged", "model"]
            found = {what: _files(place / what) for what in ("model", "merged", "adapter")}
            assert found == expected[_base_of(name)], name
            no_space, missing = errors[0][2 * number : 2 * number + 2]
            assert no_space == f"{place}/full: cannot be written (No space left on device)"
            if name != "dp2":  # there the last process writes nothing
                assert "the processes' parts do not cover" in missing


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_routers_choose_by_stays_fp32(tmp_path: Path) -> None:
    hf_model("deepseek-v3").save_pretrained(tmp_path / "source")
    model, source = _load(tmp_path / "source")
    export_hf(whole_weights(model), model, tmp_path / "out", source=source, merge=False, dtype=torch.bfloat16)
    before = load_file(tmp_path / "source/model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)
    assert all(torch.equal(found[name], before[name]) for name in kept)
    assert before.keys() == found.keys()
