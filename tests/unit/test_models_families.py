"""Configs and tensor names of every family, to and from Hugging Face's; unknown and odd models."""

from __future__ import annotations

import json
import re

import pytest
import torch

from megatune.errors import CheckpointError, ConfigError
from megatune.models import (
    Decoder,
    LayerSpec,
    build,
    family_for,
    family_named,
    from_hf_state,
    fuse_parts,
    shard_specs,
    split_parts,
    supported_model_types,
    to_hf_state,
)
from megatune.models.families.rope_config import rope_to_hf
from megatune.parallel.stages import cut
from tests.helpers.families import CASES, LLAMA3, LONGROPE, YARN, documents, hf_config, pair


@pytest.mark.parametrize("name", CASES)
def test_export_and_import_are_bit_exact(name: str) -> None:
    one = pair(name)
    state = one.hf_state()
    back = to_hf_state(one.spec, one.family, one.ours.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    ours = from_hf_state(one.spec, one.family, back)
    assert all(torch.equal(ours[key], value) for key, value in one.ours.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_of_the_layout_are_those_of_the_module(name: str) -> None:
    one = pair(name)
    found = {key: tuple(value.shape) for key, value in one.ours.named_parameters()}
    specs = one.ours.shard_specs()
    assert list(found) == list(specs) and list(found) == list(one.ours.state_dict())
    assert all(found[key] == spec.shape and spec.name == key for key, spec in specs.items())
    assert one.family.name_map(one.spec).keys() == found.keys()
    assert not list(one.ours.buffers())


def test_layout_of_a_stage_is_that_of_its_module() -> None:
    for name in ("llama", "llama-tied", "gpt2"):
        spec = pair(name).spec
        for part in cut([1, 1]):
            stage = build(spec, stages=[part])
            assert list(stage.shard_specs()) == [key for key, _ in stage.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_every_slice_of_groups_holds_the_same_groups_of_every_part(name: str) -> None:
    one = pair(name)
    state = one.ours.state_dict()
    fused = {key: spec.fused for key, spec in one.ours.shard_specs().items() if spec.fused}
    assert any("qkv" in key for key in fused)
    for key, order in fused.items():
        parts = split_parts(order, state[key])
        assert torch.equal(fuse_parts(order, parts), state[key])
        half = order.groups // 2
        for first, last in ((0, half), (half, order.groups)):
            piece = state[key][first * order.group_rows : last * order.group_rows]
            for part, rows in split_parts(order, piece).items():
                size = order.part_rows(part)
                assert torch.equal(rows, parts[part][first * size : last * size])


def test_qkv_rows_are_grouped_by_kv_head() -> None:
    one = pair("llama")
    qkv = one.ours.state_dict()["layers.0.attn.qkv.weight"]
    q, k, v = (one.hf.state_dict()[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    dim, group = one.spec.head_dim, one.spec.num_heads // one.spec.num_kv_heads
    second = qkv[(group + 2) * dim :]
    assert torch.equal(second, torch.cat([q[group * dim :], k[dim:], v[dim:]]))
    gate_up = one.ours.state_dict()["layers.0.mlp.gate_up.weight"]
    assert torch.equal(gate_up[1::2], one.hf.state_dict()["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name: str) -> None:
    """Ours -> config.json -> transformers gives the same logits, and a kept config is given back untouched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    one = pair(name)
    written = json.loads(json.dumps(one.family.hf_config(one.spec)))
    assert family_for(written) is one.family and one.family.spec(written) == one.spec
    original = one.hf.config.to_dict()
    assert one.family.hf_config(one.spec, original) == original
    special = dict.fromkeys(("pad_token_id", "eos_token_id"))  # Phi-3's defaults are beyond a tiny vocabulary
    config = AutoConfig.for_model(**written, **special)
    again = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    again.load_state_dict(one.hf.state_dict())
    tokens, _, _ = documents((29,), one.spec.vocab_size)
    with torch.no_grad():
        assert torch.equal(again(tokens[None]).logits, one.hf(tokens[None]).logits)


def test_a_base_that_no_longer_fits_keeps_its_other_keys() -> None:
    one = pair("llama3.1")
    base = one.hf.config.to_dict() | {"eos_token_id": [7, 8], "my_note": "kept", "vocab_size": 5}
    found = one.family.hf_config(one.spec, base)
    assert found["eos_token_id"] == [7, 8] and found["my_note"] == "kept"
    assert one.family.spec(found) == one.spec and "rope_parameters" not in found


@pytest.mark.parametrize(
    "name, old_style",
    [
        ("llama3.1", {"rope_theta": 10000.0, "rope_scaling": LLAMA3}),
        (
            "llama3.1",
            {"rope_theta": 10000.0, "rope_scaling": LLAMA3 | {"type": "llama3", "rope_type": "llama3"}},
        ),
        ("mistral-all", {"rope_theta": 10000.0, "rope_scaling": YARN}),
        (
            "gemma3",
            {
                "rope_theta": 10000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        ),
        (
            "phi3-long",
            {
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "rope_scaling": {key: LONGROPE[key] for key in ("long_factor", "short_factor")}
                | {"type": "su"},
            },
        ),
        ("phi3", {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_scaling": None}),
    ],
)
def test_configs_of_older_transformers_mean_the_same(name: str, old_style: dict) -> None:
    one = pair(name)
    config = {key: value for key, value in one.hf.config.to_dict().items() if key != "rope_parameters"}
    assert one.family.spec(config | old_style) == one.spec


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2-window"])
def test_layer_patterns_without_layer_types(name: str) -> None:
    one = pair(name)
    config = {key: value for key, value in one.hf.config.to_dict().items() if key != "layer_types"}
    config["sliding_window_pattern"] = 3
    assert one.family.spec(config | {"_sliding_window_pattern": None}).layers == one.spec.layers


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2"]
)
def test_keys_left_out_have_transformers_defaults(model_type: str) -> None:
    """A config with only its sizes: our spec equals that of the config that transformers completes."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 32}
    if model_type == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 9}
    bare = sizes | {"model_type": model_type}
    full = AutoConfig.for_model(**bare).to_dict()
    family = family_for(bare)
    assert family.spec(bare) == family.spec(full)


def test_scale_of_published_models() -> None:
    """Facts of two published configs, by hand."""
    gemma = family_for({"model_type": "gemma3_text"})
    sizes = {
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "sliding_window_pattern": 6,
    }
    spec = gemma.spec(sizes)
    assert [index for index, layer in enumerate(spec.layers) if layer.window is None] == [5, 11, 17, 23]
    assert spec.layers[0] == LayerSpec(512, 0) and spec.layers[5] == LayerSpec(None, 1)
    assert (spec.ropes[0].theta, spec.ropes[1].theta) == (10000.0, 1000000.0)
    assert spec.tied_embeddings and spec.norm_offset == 1.0 and spec.attention_scale == 1 / 16


# ---- what is refused


def _llama(**changes: object) -> dict:
    return hf_config("llama").to_dict() | changes


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "bert"}, ["bert", "llama", "qwen3", "gemma3_text", "gpt2"]),
        ({"architectures": ["Nothing"]}, ["Nothing", "mistral"]),
        ({}, ["None", "llama"]),
        (_llama(architectures=["LlamaForSequenceClassification"]), ["LlamaForSequenceClassification"]),
        (_llama(quantization_config={"quant_method": "gptq"}), ["gptq", "bf16"]),
    ],
)
def test_unknown_models_are_refused_and_supported_ones_named(config: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        family_for(config)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": None}, "`hidden_size`.*positive integer"),
        ({"vocab_size": "many"}, "`vocab_size`"),
        ({"num_key_value_heads": 4}, "num_attention_heads"),
        ({"hidden_act": "relu2"}, "relu2.*silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "llama3.*low_freq_factor"),
        ({"rope_parameters": LONGROPE}, "long_factor has 3 numbers, but 4"),
    ],
)
def test_odd_llama_configs_are_refused(changes: dict, words: str) -> None:
    config = _llama(**changes)
    with pytest.raises(ConfigError, match=words):
        family_for(config).spec(config)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_odd_configs_of_other_families_are_refused(name: str, changes: dict, words: str) -> None:
    config = hf_config(name).to_dict() | changes
    with pytest.raises(ConfigError, match=words):
        family_for(config).spec(config)


def test_scaled_local_rope_of_gemma3_is_refused() -> None:
    config = hf_config("gemma3").to_dict()
    config["rope_parameters"]["sliding_attention"] = LLAMA3
    with pytest.raises(ConfigError, match="sliding layers"):
        family_for(config).spec(config)


def test_missing_and_misshapen_tensors_are_named() -> None:
    one = pair("phi3")
    state = one.hf_state()
    name = "model.layers.1.mlp.gate_up_proj.weight"
    with pytest.raises(CheckpointError, match=re.escape(name)):
        from_hf_state(one.spec, one.family, {key: value for key, value in state.items() if key != name})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        from_hf_state(one.spec, one.family, state | {name: state[name][:-1]})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\(103, 48\)"):
        embed = "model.embed_tokens.weight"
        from_hf_state(one.spec, one.family, state | {embed: torch.zeros(103, 48)})


def test_families_by_name() -> None:
    for name in CASES:
        one = pair(name)
        assert family_named(one.spec.family) is one.family
    with pytest.raises(ConfigError, match="known are llama"):
        family_named("nothing")
    assert len(set(supported_model_types())) == len(supported_model_types()) == 9


def test_rope_without_scaling_writes_none() -> None:
    assert rope_to_hf(pair("llama").spec.ropes[0]) is None


def test_decoder_is_built_without_memory() -> None:
    model = build(pair("gemma2").spec)
    assert isinstance(model, Decoder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert shard_specs(model.spec) == model.shard_specs()
