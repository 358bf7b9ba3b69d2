"""Configs and tensor names of every family, to and from Hugging Face's; unknown and odd models."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.sources import SafetensorsFolder
from megatune.errors import CheckpointError, ConfigError
from megatune.models import (
    Decoder,
    LayerSpec,
    build,
    count_parameters,
    family_for,
    family_named,
    flops_per_token,
    from_hf_state,
    fuse_parts,
    shard_specs,
    split_parts,
    supported_model_types,
    to_hf_state,
)
from megatune.models.families.rope_config import rope_to_hf
from megatune.parallel.shard import local_shape
from megatune.parallel.stages import cut
from megatune.parallel.world import Axis, World
from tests.helpers.families import (
    CASES,
    GPT_OSS_YARN,
    LLAMA3,
    LONGROPE,
    MOE_CASES,
    YARN,
    documents,
    hf_config,
    hf_from_config,
    pair,
)


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
    found = {key: tuple(value.shape) for key, value in one.ours.state_dict().items()}
    specs = one.ours.shard_specs()
    assert list(found) == list(specs)
    assert all(found[key] == spec.shape and spec.name == key for key, spec in specs.items())
    assert one.family.name_map(one.spec).keys() == found.keys()
    # What has no gradient is a buffer, saved and exported with the rest.
    buffers = {key for key, _ in one.ours.named_buffers()}
    assert buffers == {key for key in found if key.endswith("router.correction")}


def test_layout_of_a_stage_is_that_of_its_module() -> None:
    for name in ("llama", "llama-tied", "gpt2"):
        spec = pair(name).spec
        for part in cut([1, 1]):
            stage = build(spec, stages=[part])
            assert list(stage.shard_specs()) == [key for key, _ in stage.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_every_slice_of_groups_holds_the_same_groups_of_every_part(name: str) -> None:
    one = pair(name)
    fused = {key: spec for key, spec in one.ours.shard_specs().items() if spec.fused}
    assert fused
    for key, spec in fused.items():
        order, matrix = spec.fused, one.ours.state_dict()[key]
        matrix = matrix[-1] if spec.expert else matrix
        parts = split_parts(order, matrix)
        assert torch.equal(fuse_parts(order, parts), matrix)
        half = order.groups // 2
        for first, last in ((0, half), (half, order.groups)):
            piece = matrix[first * order.group_rows : last * order.group_rows]
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
    from transformers import AutoConfig

    one = pair(name)
    written = json.loads(json.dumps(one.family.hf_config(one.spec)))
    assert family_for(written) is one.family and one.family.spec(written) == one.spec
    original = one.hf.config.to_dict()
    assert one.family.hf_config(one.spec, original) == original
    special = dict.fromkeys(("pad_token_id", "eos_token_id"))  # Phi-3's defaults are beyond a tiny vocabulary
    config = AutoConfig.for_model(**written, **special)
    again = hf_from_config(config)
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
        ("mixtral", {"rope_theta": 1000000.0}),
        (
            "qwen3-moe",
            {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 5, "num_local_experts": None},
        ),
        (
            "deepseek-v3",
            {
                "rope_theta": 10000,
                "rope_scaling": {key: YARN[key] for key in ("factor", "original_max_position_embeddings")}
                | {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.0},
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "moe_layer_freq": 1,
                "num_nextn_predict_layers": 1,
            },
        ),
        ("gpt-oss", {"rope_theta": 10000.0, "rope_scaling": GPT_OSS_YARN, "swiglu_limit": 7.0}),
    ],
)
def test_configs_of_older_transformers_mean_the_same(name: str, old_style: dict) -> None:
    one = pair(name)
    config = {key: value for key, value in one.hf.config.to_dict().items() if key != "rope_parameters"}
    assert one.family.spec(config | old_style) == one.spec


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2-window", "gpt-oss"])
def test_layer_patterns_without_layer_types(name: str) -> None:
    one = pair(name)
    config = {key: value for key, value in one.hf.config.to_dict().items() if key != "layer_types"}
    config["sliding_window_pattern"] = 3
    assert one.family.spec(config | {"_sliding_window_pattern": None}).layers == one.spec.layers


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "gpt2",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
    ],
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


def test_facts_of_published_mixtures() -> None:
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2: 671B, 37B of them active) and gpt-oss-20b (model card: 20.9B, 3.6B
    active without the embedding's rows), from the keys of their config.json."""
    deepseek = family_for({"model_type": "deepseek_v3"}).spec(
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
        }
    )
    assert count_parameters(deepseek) == pytest.approx(671e9, rel=0.002)
    assert deepseek.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert deepseek.ropes[0].attention_factor == 1.0
    # Products alone: without attention's share, which grows with the length.
    assert flops_per_token(deepseek, 1) / 6 == pytest.approx(37e9, rel=0.02)
    gpt_oss = family_for({"model_type": "gpt_oss"}).spec(
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_local_experts": 32,
        }
    )
    assert count_parameters(gpt_oss) == pytest.approx(20.9e9, rel=0.002)
    assert flops_per_token(gpt_oss, 1) / 6 == pytest.approx(3.6e9, rel=0.01)
    assert [layer.window for layer in gpt_oss.layers[:3]] == [128, None, 128]
    assert gpt_oss.ropes[0].theta == 150000.0 and not gpt_oss.ropes[0].truncate


@pytest.mark.parametrize("name", MOE_CASES)
def test_files_of_transformers_are_read(name: str, tmp_path: Path) -> None:
    """What `save_pretrained` writes is what the name map says, and every expert comes to its place."""
    one = pair(name)
    one.hf.save_pretrained(tmp_path)
    source = SafetensorsFolder(tmp_path)
    specs, state = one.ours.shard_specs(), one.ours.state_dict()
    pieces = one.family.name_map(one.spec)
    mapped = {key: Mapped(spec.shape, tuple(pieces[key]), spec.fused) for key, spec in specs.items()}
    assert (
        source.names() == {hf for item in mapped.values() for hf in item.hf_shapes()} == set(one.hf_state())
    )
    for key, item in mapped.items():
        assert all(source.shape(hf) == shape for hf, shape in item.hf_shapes().items())
        assert torch.equal(item.read(source, 0, item.shape[0]), state[key])


@pytest.mark.parametrize("name", MOE_CASES)
def test_shapes_of_a_slice_are_those_of_its_module(name: str) -> None:
    """Every process of tp 2, ep 2 and ep 2 with etp 2; joined, their boxes are the whole."""
    spec = pair(name).spec
    if spec.moe.num_experts % 2:
        spec = replace(spec, moe=replace(spec.moe, num_experts=spec.moe.num_experts + 1))
    for tp, ep, etp in ((2, 1, 2), (1, 2, 1), (2, 2, 1), (2, 2, 2)):
        covered: dict[str, int] = {}
        for ranks in itertools.product(range(tp), range(ep), range(etp)):
            axes = {
                axis: Axis(axis, size, rank, tuple(range(size)))
                for axis, size, rank in zip(("tp", "ep", "etp"), (tp, ep, etp), ranks, strict=True)
            }
            world = replace(World.alone(), **axes)
            model = build(spec, world)
            found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            specs = model.shard_specs()
            assert found == {key: local_shape(one, world.cut) for key, one in specs.items()}
            for key, one in specs.items():
                # Of the processes that hold the same slice, the first counts.
                if not any(ranks[:1] if one.expert else ranks[1:]) and (
                    one.tensor_dim is not None or not ranks[2 * one.expert]
                ):
                    covered[key] = covered.get(key, 0) + math.prod(found[key])
        assert covered == {key: math.prod(one.shape) for key, one in shard_specs(spec).items()}


def test_layers_for_multi_token_prediction_are_left_out() -> None:
    one = pair("deepseek-v3")
    unused = one.family.is_unused
    assert unused(one.spec, "model.layers.3.eh_proj.weight") and unused(one.spec, "layers.4.mlp.gate.weight")
    assert not unused(one.spec, "model.layers.2.mlp.gate.weight") and not unused(
        one.spec, "model.norm.weight"
    )
    assert not unused(one.spec, "other.layers.9.weight")
    assert not pair("mixtral").family.is_unused(pair("mixtral").spec, "model.layers.9.weight")
    base = one.hf.config.to_dict() | {"num_nextn_predict_layers": 1}
    assert one.family.hf_config(one.spec, base) == base | {"num_nextn_predict_layers": 0}


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
        ({"model_type": "mixtral", "quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4", "bf16"]),
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
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen3-moe", {"num_experts": 0}, "num_experts"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func.*'sigmoid' is supported"),
        ("deepseek-v3", {"n_group": 3}, r"n_group \(3\) must divide n_routed_experts \(8\)"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit.*7.0 is supported"),
        ("gpt-oss", {"layer_types": ["full_attention"]}, "layer_types has 1"),
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
    assert len(set(supported_model_types())) == len(supported_model_types()) == 13


def test_expert_tensors_that_are_missing_are_named() -> None:
    one = pair("mixtral")
    state = one.hf_state()
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(CheckpointError, match=re.escape(name)):
        from_hf_state(one.spec, one.family, {key: value for key, value in state.items() if key != name})


def test_rope_without_scaling_writes_none() -> None:
    assert rope_to_hf(pair("llama").spec.ropes[0]) is None


def test_decoder_is_built_without_memory() -> None:
    model = build(pair("gemma2").spec)
    assert isinstance(model, Decoder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert shard_specs(model.spec) == model.shard_specs()
