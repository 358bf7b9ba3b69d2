"""Building, dtypes, random weights, counts, and the model under `fully_shard`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from megatune.models import (
    CausalLM,
    Decoder,
    DecoderSpec,
    LayerSpec,
    RopeSpec,
    build,
    count_parameters,
    fill_random,
    flops_per_token,
    materialise_random,
    set_dtypes,
)
from megatune.models.generate import generate
from megatune.ops import Segments
from megatune.parallel.shard import Box, Parts
from tests.helpers.dist import run_ranks
from tests.helpers.families import CASES, documents, pair

SPEC = DecoderSpec(
    family="llama",
    vocab_size=1100,
    hidden_size=32,
    mlp_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerSpec(), LayerSpec(window=5)),
    ropes=(RopeSpec(10000.0, 8),),
    max_positions=64,
)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted(name: str) -> None:
    one = pair(name)
    tensors = (tensor for key, tensor in one.hf.state_dict().items() if key != "lm_head.weight")
    head = 0 if one.spec.tied_embeddings else one.spec.vocab_size * one.spec.hidden_size
    assert count_parameters(one.spec) == head + sum(tensor.numel() for tensor in tensors)


def test_parameters_of_a_published_model() -> None:
    """Llama 3.1 8B has 8,030,261,248 parameters."""
    spec = DecoderSpec(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        mlp_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        layers=(LayerSpec(),) * 32,
        ropes=(RopeSpec(500000.0, 128),),
        max_positions=131072,
    )
    assert count_parameters(spec) == 8030261248


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "gpt2", "mistral", "mixtral", "deepseek-v3", "deepseek-v3-direct", "gpt-oss"],
)
def test_flops_are_those_of_the_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with matrices as torch counts them; attention by counting the keys that each query sees."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatune import ops

    monkeypatch.setattr(ops, "attention", lambda q, k, v, segments, **_: q[..., : v.shape[2]])
    one, length = pair(name), 32
    tokens, segments, _ = documents((length,), one.spec.vocab_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one.ours(tokens, segments)
    matrices = counter.get_total_flops() / length
    spec = one.spec
    keys = sum(min(i, layer.window or i) for layer in spec.layers for i in range(1, length + 1)) / length
    value_dim = spec.mla.value_dim if spec.mla else spec.head_dim
    attention = 2 * spec.num_heads * (spec.head_dim + value_dim) * keys
    assert flops_per_token(spec, length) == pytest.approx(3 * (matrices + attention))
    # Frozen: the gradients of matrices are left out, attention's backward is not.
    assert flops_per_token(spec, length, frozen=True) == pytest.approx(2 * matrices + 3 * attention)


def test_dtypes() -> None:
    model = build(SPEC)
    model.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    set_dtypes(model, torch.bfloat16)
    found = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert found.pop("norm.weight") == torch.float32
    assert set(found.values()) == {torch.bfloat16}
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_random_weights_are_as_documented() -> None:
    model = build(SPEC)
    materialise_random(model, 3, "cpu")
    state = model.state_dict()
    assert state["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    assert torch.equal(state["layers.1.attn_norm.weight"], torch.ones(32))
    again, other = build(SPEC), build(SPEC)
    materialise_random(again, 3, "cpu", torch.bfloat16)
    materialise_random(other, 4, "cpu")
    for name, value in again.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, state[name].bfloat16())
    assert not torch.equal(other.head.weight, model.head.weight)
    assert not torch.equal(model.embed.weight, model.head.weight)


@pytest.mark.parametrize("shape", [(3000, 4), (5, 600, 4)])
def test_any_part_of_a_random_tensor_is_that_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = torch.empty(shape)
    fill_random({"embed.weight": Parts(shape, ((Box((0,) * len(shape), shape), whole),), True)}, SPEC, 7)
    assert whole.std().item() == pytest.approx(0.02, rel=0.05)
    assert len(whole.unique()) > 0.9 * whole.numel()
    lead = len(shape) - 2
    for first, last in (
        [(0, 1), (300, 550), (599, 600)] if lead else [(0, 1), (1000, 1050), (1024, 2048), (1100, 3000)]
    ):
        box = Box((2,) * lead + (first, 1), (3,) * lead + (last - first, 2))
        part = torch.empty(box.shape)
        fill_random({"embed.weight": Parts(shape, ((box, part),), True)}, SPEC, 7)
        assert torch.equal(part, box.of(whole))


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_random_weights_make_a_sane_model(name: str) -> None:
    """Norms have an effective weight of 1 and biases are 0: an untrained model is close to uniform."""
    spec = pair(name).spec
    model = build(spec)
    materialise_random(model, 0, "cpu")
    tokens, segments, targets = documents((31,), spec.vocab_size)
    loss = model(tokens, segments, targets).item() / len(targets.index)
    assert loss == pytest.approx(math.log(spec.vocab_size), rel=0.1)


def test_causal_lm_runs_each_row_by_itself() -> None:
    one = pair("mistral")
    model = CausalLM(one.ours)
    tokens = torch.randint(0, one.spec.vocab_size, (3, 17))
    with torch.no_grad():
        logits = model(tokens)
        assert logits.shape == (3, 17, one.spec.vocab_size)
        torch.testing.assert_close(logits, one.hf(tokens).logits, rtol=1e-4, atol=1e-4)


# ---- under fully_shard


def _run(model: nn.Module, recompute: int) -> tuple[float, torch.Tensor, list[int]]:
    tokens, segments, targets = documents((9, 14), SPEC.vocab_size)
    model.recompute = recompute or "none"
    loss = model(tokens, segments, targets)
    loss.backward()
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad
        gradients.append((gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).flatten())
    with torch.no_grad():
        logits = model(tokens, segments)
    return loss.item(), torch.cat(gradients), logits.argmax(-1).tolist()


def _sharded(rank: int, world_size: int, tied: bool, recompute: int) -> tuple[float, torch.Tensor, list[int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build(replace(SPEC, tied_embeddings=tied))
    materialise_random(model, 5, "cpu")
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, gradients, tokens = _run(model, recompute)
    answer = list(generate(model, [1, 2, 3], max_new_tokens=4))
    return loss, gradients, tokens + answer


@pytest.mark.parametrize("tied, recompute, world_size", [(False, 0, 2), (True, 1, 3)])
def test_sharded_model_equals_the_whole_one(tied: bool, recompute: int, world_size: int) -> None:
    """1100 rows of vocabulary cut in 2 or 3: shards are not whole blocks of the random numbers' 1024 rows."""
    whole = build(replace(SPEC, tied_embeddings=tied))
    materialise_random(whole, 5, "cpu")
    loss, gradients, tokens = _run(whole, recompute)
    tokens += list(generate(whole, [1, 2, 3], max_new_tokens=4))
    for found in run_ranks(_sharded, world_size, tied, recompute):
        assert found[0] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found[1], gradients, rtol=1e-4, atol=1e-6)
        assert found[2] == tokens


def test_layers_are_called_as_modules() -> None:
    """Replacing a layer's call, as `layer.compile()` and sharding do, is seen by the decoder."""
    model: Decoder = build(SPEC)
    materialise_random(model, 0, "cpu")
    seen = []
    model.layers["1"].register_forward_hook(lambda *_: seen.append(1))
    model(torch.tensor([1, 2]), Segments.from_lengths((2,)))
    assert seen == [1]
