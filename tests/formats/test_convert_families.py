"""Hugging Face folders and megatune checkpoints, there and back: every bit, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatune.checkpoint.convert import hf as hf_format
from megatune.checkpoint.convert import megatune_run, run_source
from megatune.checkpoint.convert.base import Options
from megatune.checkpoint.convert.core import DIGESTS, convert
from megatune.serve.load import load_model
from tests.helpers.families import documents, pair
from tests.helpers.runs import tensors
from tests.helpers.tiny import make_llama

# One of each kind of names and fused tensors.
SOME = [
    "llama",
    "llama-tied",
    "llama-biases",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "mixtral",
]
SOME += ["qwen3-moe", "deepseek-v3", "deepseek-v3-direct", "gpt-oss"]


def digests(folder: Path) -> dict:
    return json.loads((folder / DIGESTS).read_text())["tensors"]


@pytest.mark.parametrize("name", SOME)
def test_there_and_back_is_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small parts, files and windows: groups of rows are cut, and several jobs write into one file.
    monkeypatch.setattr(hf_format, "MAX_SHARD_BYTES", 60_000)
    monkeypatch.setattr(hf_format, "PART_BYTES", 20_000)
    monkeypatch.setattr(hf_format, "PORTION_BYTES", 5_000)
    monkeypatch.setattr(megatune_run, "FILE_BYTES", 30_000)
    monkeypatch.setattr(megatune_run, "PORTION_BYTES", 5_000)
    monkeypatch.setattr(run_source, "WINDOW_BYTES", 7_000)
    pair(name).hf.save_pretrained(tmp_path / "source")
    there = convert(tmp_path / "source", tmp_path / "ours", "megatune", verify=True, workers=1)
    assert (there.kind, there.verified) == ("hf", True)
    assert len(list((tmp_path / "ours/checkpoints/step-000000").glob("*.safetensors"))) > 1
    back = convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True, workers=1)
    assert (back.kind, back.tensors) == ("megatune", there.tensors)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(after[key].dtype == one.dtype and torch.equal(after[key], one) for key, one in before.items())
    assert digests(tmp_path / "ours") == digests(tmp_path / "back")


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "deepseek-v3", "gpt-oss"])
def test_a_converted_folder_is_a_model_path(name: str, tmp_path: Path) -> None:
    pair(name).hf.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", "megatune")
    ours = load_model(tmp_path / "ours", dtype="fp32")
    tokens, segments, _ = documents((11,), ours.decoder.spec.vocab_size)
    with torch.no_grad():
        assert torch.equal(ours.decoder(tokens, segments), pair(name).ours(tokens, segments))


@pytest.mark.parametrize("tied", [False, True])
def test_exported_folders_open_in_transformers(tied: bool, tmp_path: Path) -> None:
    make_llama(tmp_path / "source", tied=tied, dtype=torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "ours", "megatune")
    convert(tmp_path / "ours", tmp_path / "out", "hf")
    models, tokenizers = zip(
        *(
            (
                AutoModelForCausalLM.from_pretrained(tmp_path / at),
                AutoTokenizer.from_pretrained(tmp_path / at),
            )
            for at in ("source", "out")
        ),
        strict=True,
    )
    messages = [{"role": "user", "content": "Where is the owl?"}]
    texts = [
        one.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for one in tokenizers
    ]
    assert texts[0] == texts[1] and "<|im_start|>user" in texts[0]
    tokens = [torch.tensor([one(text)["input_ids"]]) for one, text in zip(tokenizers, texts, strict=True)]
    with torch.no_grad():
        before, after = (model(ids).logits for model, ids in zip(models, tokens, strict=True))
    assert torch.equal(before, after) and after.dtype == torch.bfloat16
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()
    assert models[1].generation_config.eos_token_id == tokenizers[1].eos_token_id


def test_a_cast_is_reported_and_proved(tmp_path: Path) -> None:
    make_llama(tmp_path / "source")
    options = Options(dtype=torch.bfloat16)
    result = convert(tmp_path / "source", tmp_path / "out", "hf", options, verify=True)
    before, after = (
        load_file(tmp_path / "source/model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert all(torch.equal(after[name], one.bfloat16()) for name, one in before.items())
    assert {(line.what, line.detail) for line in result.report} == {("cast", "float32 to bfloat16")}
    assert len(result.report) == len(before)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_old_bin_files_are_read(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    expected = convert(source, tmp_path / "first", "hf")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, inside in shards.items():
        torch.save({name: weights[name] for name in inside}, source / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    result = convert(source, tmp_path / "out", "hf", verify=True)
    assert result.tensors == expected.tensors and digests(tmp_path / "out") == digests(tmp_path / "first")


def test_one_of_a_tied_pair_is_left_out_and_said_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from megatune.errors import CheckpointError

    source = make_llama(tmp_path / "source", tied=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    result = convert(source, tmp_path / "out", "hf", verify=True)
    said = {line.tensor: line.what for line in result.report if line.what != "mapped"}
    assert said == {
        "lm_head.weight": "tied",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "skipped",
    }
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    weights["lm_head.weight"][3, 5] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings but model.embed_tokens.weight and lm_head.weight"
    ):
        convert(source, tmp_path / "other", "hf")
