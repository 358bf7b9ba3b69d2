"""Weights into a model: every family, sharded and not; what is read and kept; folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatune import adapters
from megatune.checkpoint import load_pretrained, mapping, resolve_model
from megatune.checkpoint.safetensors_file import SafetensorsFile
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError, ConfigError
from megatune.models import build, whole_weights
from tests.helpers.dist import run_ranks
from tests.helpers.families import CASES, documents, hf_model
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
    monkeypatch.setattr(mapping, "PORTION_BYTES", 2000)  # many portions, also of the small tensors here
    ours = _load(tmp_path)
    tokens, segments, _ = documents((11,), ours.spec.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, segments), hf(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


def _load_sharded(rank: int, world_size: int, folder: Path) -> list:
    """For each mesh: (whole parameters, logits, bytes that this rank read)."""
    return [
        _load_on(init_device_mesh("cpu", shape, mesh_dim_names=names), folder, rank)
        for shape, names in [((4,), ("dp_shard",)), ((2, 2), ("dp_replicate", "dp_shard"))]
    ]


def _load_on(mesh: DeviceMesh, folder: Path, rank: int) -> tuple:
    source = resolve_model(str(folder))
    model = build(source.spec)
    adapters.attach(model, LoraMethod(type="lora", rank=3))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    reads: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        _spy(patch, reads)
        load_pretrained(model, source, device="cpu", seed=5)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    # The wrapped model computes with them: fully_shard's own buffers are these weights.
    tokens, segments, _ = documents((9,), source.spec.vocab_size)
    with torch.no_grad():
        logits = model(tokens, segments)
    return whole if rank == 0 else None, logits, sum(size for _, size in reads)


def _spy(patch: pytest.MonkeyPatch, reads: list[tuple[str, int]]) -> None:
    """Note the name and the bytes of every read of a file."""
    rows = SafetensorsFile.rows

    def spy(self, name, start, stop):
        found = rows(self, name, start, stop)
        reads.append((name, found.numel() * found.element_size()))
        return found

    patch.setattr(SafetensorsFile, "rows", spy)


def test_sharded_loading_gives_the_same_bits(tmp_path: Path) -> None:
    # Nothing divides by 4: the last rank has fewer rows of the embedding and of gate_up, and none of the stacked A
    # matrices; borders of the ranks' rows of qkv lie inside groups.
    folder = make_llama(tmp_path, vocab_size=318, mlp=129)
    source = resolve_model(str(folder))
    alone = build(source.spec)
    adapters.attach(alone, LoraMethod(type="lora", rank=3))
    load_pretrained(whole_weights(alone.to_empty(device="cpu")), source.spec, source, seed=5)
    expected = dict(alone.named_parameters())
    tokens, segments, _ = documents((9,), source.spec.vocab_size)
    size = (folder / "model.safetensors").stat().st_size
    ranks = run_ranks(_load_sharded, 4, folder)
    for mesh, share in ((0, 0.25), (1, 0.5)):
        whole, logits, _ = ranks[0][mesh]
        assert whole.keys() == expected.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, expected[name]), name
        torch.testing.assert_close(logits, alone(tokens, segments), rtol=1e-5, atol=1e-6)
        # Each rank reads its share, and of qkv the groups that its rows are in.
        assert max(rank[mesh][2] for rank in ranks) < share * size * 1.2


def test_reads_are_small_and_nothing_is_read_twice(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    _spy(monkeypatch, reads)
    monkeypatch.setattr(mapping, "PORTION_BYTES", 20_000)
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
    model = build(source.spec)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*{message}"):
        load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source)
    assert all(parameter.is_meta for parameter in model.parameters())  # before anything is loaded


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
