"""What trains under full, freeze and LoRA; LoRA's logits and gradients against the `peft` library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from megatune import adapters
from megatune.adapters.lora import lora_scale
from megatune.checkpoint.peft import adapter_map
from megatune.checkpoint.pretrained import init_adapter
from megatune.config.schema import FreezeMethod, FullMethod, LoraMethod
from megatune.errors import ConfigError
from megatune.models import build, from_hf_state
from megatune.ops import Segments, keyed_dropout
from megatune.parallel.shard import Box, Parts
from tests.helpers.families import documents, hf_model, pair


def _trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _fresh(name: str):
    """A model of a family's case that the test may change, and transformers' twin."""
    hf = hf_model(name)
    spec, family = pair(name).spec, pair(name).family
    ours = build(spec).to_empty(device="cpu")
    ours.load_state_dict(from_hf_state(spec, family, hf.state_dict()))
    return ours, hf


def test_full_trains_everything() -> None:
    model = build(pair("llama").spec).requires_grad_(False)
    adapters.attach(model, FullMethod())
    trainable, total = adapters.describe(model)
    assert trainable == total == sum(p.numel() for p in pair("llama").hf.parameters())


def test_freeze_takes_last_layers_and_patterns() -> None:
    model = build(pair("llama").spec)
    adapters.attach(
        model, FreezeMethod(type="freeze", last_layers=1, modules=["norm.weight", "layers.0.mlp.*"])
    )
    expected = {n for n, _ in model.named_parameters() if n.startswith(("layers.1.", "layers.0.mlp."))}
    assert _trainable(model) == expected | {"norm.weight"}
    trainable, total = adapters.describe(model)
    assert 0 < trainable < total


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"last_layers": 3}, "last_layers: 3, but the model has 2 layers"),
        (
            {"modules": ["layer.*"]},
            r"'layer\.\*' matches no parameter; names are for example .*layers\.0\.attn\.qkv",
        ),
    ],
)
def test_freeze_that_fits_nothing(method, message) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters.attach(build(pair("llama").spec), FreezeMethod(type="freeze", **method))


def test_lora_target_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError, match="'query' is no linear layer .* choose from q_proj, k_proj, v_proj, o_proj"
    ):
        adapters.attach(build(pair("llama").spec), LoraMethod(type="lora", targets=["query"]))


def test_lora_freezes_the_base_and_keeps_its_names() -> None:
    model = build(pair("llama").spec)
    before = [name for name, _ in model.named_parameters()]
    adapters.attach(model, LoraMethod(type="lora", rank=4, targets=["k_proj", "v_proj", "down_proj"]))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if ".adapter." not in name] == before
    sites = {
        f"layers.{i}.{at}.adapter.lora_{m}" for i in (0, 1) for at in ("attn.qkv", "mlp.down") for m in "ab"
    }
    assert _trainable(model) == sites
    shapes = {
        n.removeprefix("layers.0."): tuple(p.shape) for n, p in model.named_parameters() if "layers.0" in n
    }
    assert shapes["attn.qkv.adapter.lora_a"] == (2 * 4, 48)
    assert shapes["attn.qkv.adapter.lora_b"] == (2 * 2 * 8, 4)  # k and v of 2 heads with 8 rows each
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".adapter." in n)
    assert "k_proj, v_proj, rank=4, scale=8" in repr(model.layers["0"].attn.qkv)


def _whole(tensor: torch.Tensor) -> Parts:
    """All of a global tensor in one process."""
    return Parts(tuple(tensor.shape), ((Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor),), True)


def test_initial_adapters_depend_on_seed_and_name_only() -> None:
    def values(name: str, seed: int) -> torch.Tensor:
        tensor = torch.full((8, 400), float("nan"))
        init_adapter(name, _whole(tensor), seed)
        return tensor

    first = values("layers.0.attn.qkv.adapter.lora_a", 0)
    assert torch.equal(first, values("layers.0.attn.qkv.adapter.lora_a", 0))
    assert not torch.equal(first, values("layers.0.attn.qkv.adapter.lora_a", 1))
    assert not torch.equal(first, values("layers.1.attn.qkv.adapter.lora_a", 0))
    # Kaiming uniform with a = sqrt(5): within 1/sqrt(in), standard deviation 1/sqrt(3 in).
    assert first.abs().max() <= 400**-0.5
    assert first.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    assert values("layers.0.attn.qkv.adapter.lora_b", 0).abs().max() == 0


CASES = [
    ("llama", "all-linear", False),
    ("llama", ["q_proj", "v_proj"], False),
    ("llama-biases", ["k_proj", "up_proj", "o_proj"], True),
    ("phi3", "all-linear", False),
    ("gpt2", ["c_attn", "c_proj"], False),
]


@pytest.mark.parametrize(("name", "targets", "rslora"), CASES)
def test_logits_and_gradients_equal_peft(name, targets, rslora) -> None:
    ours, hf = _fresh(name)
    method = LoraMethod(type="lora", rank=4, alpha=6, targets=targets, rslora=rslora)
    adapters.attach(ours, method)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = get_peft_model(hf, config)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    values = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if "lora_" in key}
    mapped, parameters = adapter_map(ours), dict(ours.named_parameters())
    assert {p.hf_name for item in mapped.values() for p in item.pieces} == set(values)
    for at, item in mapped.items():
        parameters[at].data.copy_(item.read(_Values(values), 0, item.shape[0]))

    tokens, segments, _ = documents((17,), ours.spec.vocab_size)
    weight = torch.randn(17, ours.spec.vocab_size, generator=generator)
    logits = ours(tokens, segments)
    expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for at, item in mapped.items():
        for key, gradient in item.split(parameters[at].grad):
            torch.testing.assert_close(gradient, values[key].grad, rtol=1e-4, atol=1e-4, msg=key)
    assert all(p.grad is None for n, p in parameters.items() if ".adapter." not in n)


class _Values:
    """A dict of tensors as a `TensorSource`."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.values[name].detach()[start:stop]


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    model, _ = _fresh("llama")
    adapters.attach(model, LoraMethod(type="lora", rank=4, dropout=0.5, targets=["down_proj"]))
    linears = [model.layers[index].mlp.down for index in "01"]
    for linear in linears:
        torch.nn.init.normal_(linear.adapter.lora_a)
        torch.nn.init.normal_(linear.adapter.lora_b)
    linear, adapter = linears[0], linears[0].adapter
    x = torch.randn(5, linear.in_features)
    base = torch.nn.functional.linear(x, linear.weight)

    def with_adapter(x: torch.Tensor) -> torch.Tensor:
        return base + x @ adapter.lora_a.T @ adapter.lora_b.T * adapter.scale

    model.train()
    segments = replace(Segments.from_lengths((2, 3)), key=9)
    masks = [keyed_dropout(torch.ones_like(x), 0.5, adapter.key(one)) for one in (segments, None)]
    assert not torch.equal(*masks)
    for mask, one in zip(masks, (segments, None), strict=True):
        torch.testing.assert_close(linear(x, one), with_adapter(x * mask), rtol=1e-5, atol=1e-5)
    assert linears[1].adapter.key(segments) != adapter.key(segments)
    torch.testing.assert_close(model.eval().layers["0"].mlp.down(x), with_adapter(x), rtol=1e-5, atol=1e-5)


def test_bf16_base_with_fp32_adapters() -> None:
    model, _ = _fresh("llama")
    adapters.attach(model, LoraMethod(type="lora", rank=4))
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            init_adapter(name.replace("lora_b", "lora_a"), _whole(parameter.data), 0)
        else:
            parameter.data = parameter.data.bfloat16()
    logits = model(torch.arange(9), Segments.from_lengths((9,)))
    logits.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert logits.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients)


def test_scale() -> None:
    assert lora_scale(LoraMethod(type="lora", rank=16, alpha=32)) == 2
    assert lora_scale(LoraMethod(type="lora", rank=16, alpha=32, rslora=True)) == 8
