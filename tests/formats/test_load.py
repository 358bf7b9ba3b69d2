"""Weights into a model: every family, every layout; what is read and kept; folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatune import adapters
from megatune.checkpoint import filling, load_pretrained, resolve_model
from megatune.checkpoint.boxes import whole_parts
from megatune.checkpoint.pretrained import init_adapter
from megatune.checkpoint.safetensors_file import SafetensorsFile
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError, ConfigError
from megatune.models import build, whole_weights
from megatune.parallel.shard import ShardSpec
from tests.helpers.families import CASES, documents, hf_model
from tests.helpers.parts import check, held, shards, values_of, worlds
from tests.helpers.tiny import make_llama


def _load(folder: Path, seed: int = 0):
    source = resolve_model(str(folder))
    model = build(source.spec)
    load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source, seed=seed)
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_family_from_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = hf_model(name)
    hf.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    monkeypatch.setattr(filling, "PORTION_BYTES", 2000)  # many portions, also of the small tensors here
    ours = _load(tmp_path)
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, segments), hf(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


def _spy(patch: pytest.MonkeyPatch, reads: list[tuple[str, int]]) -> None:
    """Note the name and the bytes of every read of a file."""
    rows = SafetensorsFile.rows

    def spy(self, name, start, stop):
        found = rows(self, name, start, stop)
        reads.append((name, found.numel() * found.element_size()))
        return found

    patch.setattr(SafetensorsFile, "rows", spy)


# How much of the file the process that reads most may read.
LAYOUTS = {
    "tp2": (0.7, {"tp": 2}),
    "tp4": (0.55, {"tp": 4}),
    "pp2": (0.75, {"pp": 2}),
    "fsdp4": (0.45, {"dp_shard": 4}),
    "fsdp2x2": (0.65, {"dp_replicate": 2, "dp_shard": 2}),
    "pp2-cp3-tp2": (0.35, {"pp": 2, "cp": 3, "tp": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_process_gets_its_part_of_the_same_bits(layout: str, tmp_path: Path, monkeypatch) -> None:
    """Nothing divides: rows of the embedding, pieces of flattened weights, borders inside of groups of qkv; fewer KV
    heads than processes."""
    folder = make_llama(tmp_path, vocab_size=319, mlp=132, layers=3, tied=True)
    source = resolve_model(str(folder))
    whole = build(source.spec)
    adapters.attach(whole, LoraMethod(type="lora", rank=3))
    specs = whole.shard_specs()
    load_pretrained(whole_weights(whole.to_empty(device="cpu")), source.spec, source, seed=5)
    values = values_of(whole)
    size = (folder / "model.safetensors").stat().st_size
    reads: list[tuple[str, int]] = []
    _spy(monkeypatch, reads)
    held_elements, share, (limit, sizes) = 0, 0.0, LAYOUTS[layout]
    for world in worlds(**sizes):
        reads.clear()
        weights = shards(held(specs, world, 3), world)
        load_pretrained(weights, source.spec, source, seed=5)
        held_elements += check(weights, values)
        share = max(share, sum(count for _, count in reads) / size)
    assert share < limit  # its rows; of qkv the groups that they are in, of row-parallel weights all columns
    assert held_elements >= sum(value.numel() for value in values.values())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_every_process_gets_its_experts(name: str, tmp_path: Path, monkeypatch) -> None:
    hf_model(name).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    model = _load(tmp_path)
    values = values_of(model)
    monkeypatch.setattr(filling, "PORTION_BYTES", 2000)
    for sizes in (
        {"dp_shard": 4, "ep": 2},
        {"tp": 2, "dp_shard": 2, "ep": 2, "etp": 2},
        {"tp": 2, "ep": 2, "pp": 2},
    ):
        for world in worlds(**sizes):
            weights = shards(held(model.shard_specs(), world, source.spec.num_layers), world)
            load_pretrained(weights, source.spec, source)
            check(weights, values)


def test_adapters_of_experts_start_alike_under_every_cut() -> None:
    """Each expert's A is drawn by itself; B is zero."""
    spec = ShardSpec("x.adapter.lora_a", (6, 4, 10), 2, expert=True)
    whole = torch.empty(spec.shape)
    init_adapter(spec.name, whole_parts(whole), 3)
    assert whole.abs().max() <= 10**-0.5
    assert whole.std().item() == pytest.approx((10 * 3) ** -0.5, rel=0.15)
    assert len(whole.unique()) > 230
    for world in worlds(tp=2, dp_shard=3, ep=3, etp=2):
        weights = shards({spec.name: spec}, world)
        init_adapter(spec.name, weights[spec.name], 3)
        check(weights, {spec.name: whole})
    other = torch.ones(6, 10, 4)
    init_adapter("x.adapter.lora_b", whole_parts(other), 3)
    assert not other.any()


def test_reads_are_small_and_nothing_is_read_twice(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    _spy(monkeypatch, reads)
    monkeypatch.setattr(filling, "PORTION_BYTES", 20_000)
    _load(tiny_llama)
    sizes = {
        name: t.numel() * t.element_size() for name, t in load_file(tiny_llama / "model.safetensors").items()
    }
    assert max(sizes.values()) > 80_000 > 20_000 >= max(size for _, size in reads)
    assert {name: sum(s for n, s in reads if n == name) for name in sizes} == sizes


def test_parameters_keep_their_dtypes(tiny_llama: Path) -> None:
    source = resolve_model(str(tiny_llama))
    model = build(source.spec)
    model.layers["1"].to(torch.bfloat16)
    load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source)
    expected = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(model.norm.weight, expected["model.norm.weight"])
    down = model.layers["1"].mlp.down.weight
    assert torch.equal(down, expected["model.layers.1.mlp.down_proj.weight"].bfloat16())


def _edit(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _config(folder: Path, **keys) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kept", ["both", EMBED, HEAD])
def test_tied_embeddings_under_either_name(kept: str, tmp_path: Path) -> None:
    folder = make_llama(tmp_path, tied=True)
    expected = load_file(folder / "model.safetensors")[EMBED]

    def change(weights):
        weights[HEAD] = weights[EMBED].clone()
        if kept != "both":
            del weights[HEAD if kept == EMBED else EMBED]

    model = _load(_edit(folder, change))
    assert torch.equal(model.embed.weight, expected)
    assert "head.weight" not in dict(model.named_parameters())


def test_names_without_the_prefix(tiny_llama: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    expected = dict(_load(tiny_llama).named_parameters())
    for name, parameter in _load(tmp_path).named_parameters():
        assert torch.equal(parameter, expected[name])


def _without(name):
    return lambda weights: weights.pop(name)


def _with(name, tensor):
    return lambda weights: weights.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("model.layers.1.mlp.up_proj.weight"),
            "1 of 21 tensors are missing, the first is model.layers.1.mlp.up",
        ),
        (
            _with(HEAD, torch.zeros(319, 64)),
            r"lm_head.weight has shape \[319, 64\] but the config asks for \[320, 64\]",
        ),
        (_with(HEAD, torch.zeros(320, 64, dtype=torch.uint8)), "lm_head.weight is quantised .uint8."),
        (
            _with(HEAD, torch.zeros(320, 64).to(torch.float8_e4m3fn)),
            "lm_head.weight is quantised .float8_e4m3fn.",
        ),
        (
            _with("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
            "1 tensors do not belong to this model, the first is model.layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(change, message: str, tmp_path: Path) -> None:
    source = resolve_model(str(_edit(make_llama(tmp_path), change)))
    model = build(source.spec).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*{message}"):
        load_pretrained(whole_weights(model), source.spec, source)
    assert all(parameter.eq(7.0).all() for parameter in model.parameters())  # before anything is filled
    # A process that holds nothing of what is wrong says the same.
    few = {name: parts for name, parts in whole_weights(model).items() if name == "norm.weight"}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(few, source.spec, source)


def test_buffers_of_old_transformers_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _load(_edit(make_llama(tmp_path), _with(name, torch.ones(8))))


def test_a_head_that_is_not_the_tied_embedding(tmp_path: Path) -> None:
    folder = _edit(make_llama(tmp_path, tied=True), _with(HEAD, torch.ones(320, 64)))
    with pytest.raises(
        CheckpointError, match="says tie_word_embeddings but model.embed_tokens.weight and lm_head.weight"
    ):
        _load(folder)


def test_config_that_is_not_supported_names_its_file(tmp_path: Path) -> None:
    folder = _config(make_llama(tmp_path), model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config.json: .*'mamba'.*supported"):
        resolve_model(str(folder))
