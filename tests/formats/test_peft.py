"""PEFT folders: ours in `peft`, theirs here, merged folders in transformers, and folders that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatune import adapters
from megatune.checkpoint import (
    export_hf,
    export_peft,
    load_peft,
    load_pretrained,
    merge_peft,
    peft_method,
    resolve_model,
)
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError
from megatune.models import build, whole_weights
from tests.helpers import families
from tests.helpers.families import documents, hf_model
from tests.helpers.parts import check, held, shards, values_of, worlds

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import merge_adapter

CASES = [
    ("llama-tied", {"targets": "all-linear"}),
    ("llama-biases", {"targets": ["q_proj", "v_proj"], "rslora": True}),
    ("phi3", {"targets": ["qkv_proj", "down_proj"]}),
    ("gpt2", {"targets": ["c_attn", "c_fc"]}),
    ("mixtral", {"targets": ["q_proj", "w1", "w2", "w3"]}),
    ("qwen3-moe-sparse", {"targets": ["gate_proj", "up_proj", "v_proj"]}),
    ("gpt-oss", {"targets": "all-linear"}),
    ("gpt-oss", {"targets": ["gate_up_proj"]}),
    ("qwen3-moe-all", {"targets": ["gate_proj", "up_proj", "down_proj", "v_proj"]}),
    ("deepseek-v3", {"targets": "all-linear"}),
]
# PEFT 0.21 takes names of projections for those of experts where a model has some, and loses the dense layers' and the
# shared experts'; it needs all projections of the experts.
NOT_IN_PEFT = ("deepseek-v3", "qwen3-moe-sparse")


def _base(name: str, folder: Path) -> Path:
    sparse = families.CASES["qwen3-moe-sparse"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CASES, "qwen3-moe-all", (sparse[0], {**sparse[1], "decoder_sparse_step": 1}))
        hf_model(name).save_pretrained(folder)
    return folder


def _adapted(base: Path, method: LoraMethod, seed: int | None = 1):
    """A model with random adapters (`seed` None: as they start)."""
    source = resolve_model(str(base))
    model = build(source.spec)
    adapters.attach(model, method)
    load_pretrained(whole_weights(model.to_empty(device="cpu")), source.spec, source)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if seed is not None and ".adapter." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, source


def _theirs(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens[None]).logits[0]


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_peft_and_transformers_open_what_we_write(name: str, keys, tmp_path: Path) -> None:
    base = _base(name, tmp_path / "base")
    method = LoraMethod(type="lora", rank=4, alpha=6, **keys)
    model, source = _adapted(base, method)
    export_peft(whole_weights(model), model, tmp_path / "adapter", method=method, base_path=str(base))
    export_hf(whole_weights(model), model, tmp_path / "merged", source=source, merge=True)
    tokens, segments, _ = documents((13,), model.spec.vocab_size)
    with torch.no_grad():
        expected = model(tokens, segments)

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    assert (_theirs(plain, tokens) - expected).abs().max() > 0.01  # the adapters do something
    if name not in NOT_IN_PEFT:
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        torch.testing.assert_close(_theirs(adapted, tokens), expected, rtol=1e-5, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(_theirs(merged, tokens), expected, rtol=1e-5, atol=1e-5)
    # Merged tensor by tensor, without a model: the same weights.
    merge_peft(resolve_model(str(base)), tmp_path / "adapter", tmp_path / "merged2")
    first, second = (load_file(tmp_path / m / "model.safetensors") for m in ("merged", "merged2"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-6, atol=1e-6)

    again, _ = _adapted(base, peft_method(tmp_path / "adapter"), seed=None)
    load_peft(whole_weights(again), again, tmp_path / "adapter")
    for (key, found), (_, wanted) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(found, wanted), key


def test_an_adapter_of_peft_loads_here(tmp_path: Path) -> None:
    base = _base("llama", tmp_path / "base")
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=True
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = get_peft_model(plain, config)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    method = peft_method(tmp_path / "adapter")
    assert (method.rank, method.alpha, method.rslora, method.targets) == (3, 5, True, ["k_proj", "up_proj"])
    model, _ = _adapted(base, method, seed=None)
    load_peft(whole_weights(model), model, tmp_path / "adapter")
    tokens, segments, _ = documents((13,), model.spec.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, segments), _theirs(theirs, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt-oss"])
def test_every_process_gets_its_part_of_an_adapter(name: str, tmp_path: Path) -> None:
    method = LoraMethod(type="lora", rank=3)
    model, _ = _adapted(_base(name, tmp_path / "base"), method)
    export_peft(whole_weights(model), model, tmp_path / "adapter", method=method, base_path="base")
    values = {key: value for key, value in values_of(model).items() if ".adapter." in key}
    for sizes in ({"tp": 2, "pp": 2}, {"dp_shard": 4, "ep": 2}, {"tp": 2, "dp_shard": 2, "ep": 2, "etp": 2}):
        for world in worlds(**sizes):
            weights = shards(held(model.shard_specs(), world, model.spec.num_layers), world)
            load_peft(weights, model, tmp_path / "adapter")
            check({key: parts for key, parts in weights.items() if ".adapter." in key}, values)
            others = [
                view for key, parts in weights.items() if ".adapter." not in key for _, view in parts.parts
            ]
            assert not any(view.any() for view in others)


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    method = LoraMethod(type="lora", rank=4, targets=["q_proj", "down_proj"])
    model, _ = _adapted(tiny_llama, method)
    export_peft(whole_weights(model), model, tmp_path / "adapter", method=method, base_path=str(tiny_llama))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora: True is not supported; merge"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .* is not supported"),
        ({"target_modules": ".*q_proj"}, r"target_modules is '\.\*q_proj'"),
    ],
)
def test_adapters_of_other_kinds(adapter: Path, keys, message: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError, match=message):
        peft_method(adapter)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(Q), f"1 of 8 tensors are missing, the first is {Q}"),
        (
            lambda w: w.update(extra=torch.zeros(1)),
            "1 tensors do not belong to this model, the first is extra",
        ),
        (lambda w: w.update({Q: torch.zeros(5, 64)}), r"q_proj.lora_A.weight has shape \[5, 64\]"),
    ],
)
def test_tensors_that_do_not_fit(adapter: Path, tiny_llama: Path, change, message: str) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    model, _ = _adapted(tiny_llama, peft_method(adapter))
    with pytest.raises(CheckpointError, match=message):
        load_peft(whole_weights(model), model, adapter)


def test_an_adapter_with_another_scale(adapter: Path, tiny_llama: Path) -> None:
    method = peft_method(adapter).model_copy(update={"alpha": 1.0})
    model, _ = _adapted(tiny_llama, method)
    with pytest.raises(
        CheckpointError, match="scales its adapters by 8 but the run by 0.25 .*set method.alpha: 32"
    ):
        load_peft(whole_weights(model), model, adapter)


def test_folders_that_are_no_adapters(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        peft_method(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        peft_method(adapter)


def test_the_merge_tool(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "merged"
    assert merge_adapter.main([str(tiny_llama), str(adapter), str(out), "--dtype", "bf16"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    merged, base = (load_file(folder / "model.safetensors") for folder in (out, tiny_llama))
    values = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    change = (
        8
        * values[f"base_model.model.{name}.lora_B.weight"]
        @ values[f"base_model.model.{name}.lora_A.weight"]
    )
    assert torch.equal(merged[f"{name}.weight"], (base[f"{name}.weight"] + change).bfloat16())
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"].bfloat16())
    assert (out / "tokenizer.json").exists()
    assert merge_adapter.main([str(tiny_llama), str(tmp_path), str(out)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_merging_into_another_base(adapter: Path, tmp_path: Path) -> None:
    base = resolve_model(str(_base("llama", tmp_path / "base")))
    with pytest.raises(CheckpointError, match="the adapter belongs to another base model"):
        merge_peft(base, adapter, tmp_path / "merged")
    other = resolve_model(str(_base("gpt2", tmp_path / "other")))
    with pytest.raises(CheckpointError, match="8 tensors have no place in"):
        merge_peft(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
