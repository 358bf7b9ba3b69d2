"""Tensor and sequence parallelism equal one process: loss, logits, every gradient, generation; in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatune import adapters, parallel
from megatune.config.schema import LoraMethod, ParallelConfig
from megatune.errors import ParallelError
from megatune.models import Decoder, DecoderSpec, LayerSpec, RopeSpec, build
from megatune.models.generate import generate
from megatune.models.layout import check_tensor
from megatune.ops import Segments, Targets
from megatune.parallel import World, deferred, linear
from megatune.parallel.collectives import sum_
from megatune.parallel.tensor import whole_tokens
from tests.helpers.dist import run_ranks
from tests.helpers.whole import load_whole, packed_batch, random_state, slice_of

LLAMA = DecoderSpec(
    family="llama",
    vocab_size=101,
    hidden_size=32,
    mlp_size=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    layers=(LayerSpec(), LayerSpec()),
    ropes=(RopeSpec(theta=10000.0, dim=8),),
    max_positions=64,
    attention_scale=8**-0.5,
)
GPT2 = replace(
    LLAMA,
    family="gpt2",
    num_kv_heads=8,
    layers=(LayerSpec(rope=None),) * 2,
    ropes=(),
    activation="gelu_tanh",
    gated_mlp=False,
    norm="layer",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    tied_embeddings=True,
    positions="learned",
)
GEMMA = replace(
    LLAMA,
    family="gemma2",
    layers=(LayerSpec(window=5), LayerSpec()),
    activation="gelu_tanh",
    norm_offset=1.0,
    norm_placement="both",
    attention_softcap=2.0,
    logit_softcap=3.0,
    embedding_scale=32**0.5,
    tied_embeddings=True,
)
SPECS = {
    "llama": LLAMA,
    "llama-biases": replace(
        LLAMA, qkv_bias=True, attention_out_bias=True, mlp_bias=True, tied_embeddings=True
    ),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm="head"),
    "olmo2": replace(LLAMA, family="olmo2", qk_norm="full", norm_placement="post"),
    "gemma2": GEMMA,
    "gpt2": GPT2,
    # Fewer key/value heads than processes.
    "llama-kv1": replace(LLAMA, num_kv_heads=1, qkv_bias=True),
    "qwen3-kv2": replace(LLAMA, family="qwen3", qk_norm="head", num_kv_heads=2),
    "olmo2-kv1": replace(LLAMA, family="olmo2", qk_norm="full", norm_placement="post", num_kv_heads=1),
}


@dataclass(frozen=True)
class Case:
    spec: str
    lora: tuple[str, ...] | str | None = None
    dropout: float = 0.0
    recompute: bool = False
    config: tuple[tuple[str, Any], ...] = ()
    pieces: bool = False  # communication goes in pieces


CASES = {
    2: [
        *(Case(name) for name in ("llama", "llama-biases", "olmo2", "gemma2", "gpt2", "qwen3")),
        Case("llama-kv1", config=(("overlap", False),)),
        Case("llama", recompute=True),
        Case("llama-biases", config=(("schedule", "zb-h1"),)),
        Case("llama-biases", "all-linear", dropout=0.4),
        Case("llama", "all-linear", dropout=0.4, recompute=True),
        Case("llama", "all-linear", config=(("overlap", False),)),
        Case("gpt2", "all-linear", dropout=0.4, config=(("schedule", "zb-h1"),)),
        Case("llama", ("k_proj", "up_proj", "o_proj"), config=(("schedule", "zb-h1"),)),
        Case("llama-biases", pieces=True),
        Case("gpt2", "all-linear", dropout=0.4, pieces=True),
        Case("llama", "all-linear", recompute=True, pieces=True),
        Case("gpt2", "all-linear", config=(("schedule", "zb-h1"),), pieces=True),
    ],
    4: [
        *(Case(name) for name in ("llama", "llama-kv1", "qwen3-kv2", "olmo2", "olmo2-kv1")),
        Case("llama-kv1", ("q_proj", "v_proj", "down_proj"), dropout=0.4),
        Case("qwen3-kv2", "all-linear"),
        Case("gpt2", "all-linear", dropout=0.4, pieces=True),
    ],
}


def _model(case: Case, world: World | None = None) -> Decoder:
    model = build(SPECS[case.spec], world)
    if case.lora is not None:
        targets = case.lora if isinstance(case.lora, str) else list(case.lora)
        adapters.attach(
            model, LoraMethod(type="lora", rank=4, alpha=6, targets=targets, dropout=case.dropout)
        )
    if case.recompute:
        model.recompute = 1
    return model


def _backward(model: Decoder, splits: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, the replicated parameters' ones summed as the trainer does it."""
    loss = model(*packed_batch(LLAMA.vocab_size))
    if splits:
        with deferred.collecting() as queue:
            loss.backward()
        waiting = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert any("mlp" in name for name in waiting) and not any("norm" in name for name in waiting)
        queue.run()
    else:
        loss.backward()
    specs, grads = model.shard_specs(), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad.clone()
            grads[name] = sum_(grad, model.world.tp) if specs[name].partial else grad
    return loss.detach(), grads


def _compare(rank: int, world_size: int, cases: list[Case]) -> None:
    worlds: dict[Any, World] = {}
    for case in cases:
        if case.config not in worlds:
            config = ParallelConfig(tensor=world_size, **dict(case.config))
            worlds[case.config] = parallel.init(config, device="cpu")
        world = worlds[case.config]
        linear.PIECE_ROWS = 1 if case.pieces else 512
        whole, mine = _model(case), _model(case, world)
        state = random_state(whole.shard_specs().values())
        load_whole(whole, state)
        load_whole(mine, state)
        loss, grads = _backward(mine, splits="schedule" in dict(case.config))
        expected_loss, expected = _backward(whole, splits=False)
        torch.testing.assert_close(loss, expected_loss, msg=lambda m, c=case: f"{c}: loss: {m}")
        specs = mine.shard_specs()
        assert specs == whole.shard_specs() and grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert expected[name].abs().max() > 0, f"{case}: {name} has no gradient"
            wanted = slice_of(specs[name], expected[name], world.cut)
            torch.testing.assert_close(grad, wanted, msg=lambda m, c=case, n=name: f"{c}: {n}: {m}")


@pytest.mark.parametrize("processes", CASES)
def test_loss_and_gradients_equal_one_process(processes: int) -> None:
    run_ranks(_compare, processes, CASES[processes])


def _generate_and_refuse(rank: int, world_size: int) -> None:
    world = parallel.init(ParallelConfig(tensor=world_size), device="cpu")
    tokens, segments, targets = packed_batch(LLAMA.vocab_size)
    for case in (Case("gemma2"), Case("gpt2"), Case("llama-kv1", "all-linear", dropout=0.4)):
        whole, mine = _model(case), _model(case, world)
        state = random_state(whole.shard_specs().values())
        load_whole(whole, state)
        load_whole(mine, state)
        for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
            found, expected = (
                list(generate(model, [5, 6, 100], max_new_tokens=9, **options)) for model in (mine, whole)
            )
            assert found == expected and len(found) == 9, f"{case} {options}"
        whole.eval(), mine.eval()
        with torch.no_grad():
            expected = whole(tokens[:27], Segments.from_lengths((27,)))
        with whole_tokens():  # 27 tokens: no multiple of the processes
            found = mine(tokens[:27], Segments.from_lengths((27,)))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(mine(tokens, segments), whole(tokens, segments).detach())
    for wrong in (101, -1):
        labels = targets.labels.clone()
        labels[3] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            mine(tokens, segments, Targets(targets.index, labels))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            mine(torch.full_like(tokens, wrong), segments, targets)


def test_generation_logits_and_tokens_out_of_range() -> None:
    run_ranks(_generate_and_refuse, 2)


def _low_precision(rank: int, world_size: int) -> None:
    world = parallel.init(ParallelConfig(tensor=world_size), device="cpu")
    for case in (Case("qwen3"), Case("olmo2"), Case("llama-biases", "all-linear", dropout=0.4)):
        whole, mine = _model(case), _model(case, world)
        state = random_state(whole.shard_specs().values())
        losses = []
        for model in (mine, whole):
            load_whole(model, state, torch.bfloat16)
            for name, parameter in model.named_parameters():
                if ".adapter." in name:
                    parameter.data = parameter.data.float()
            loss, grads = _backward(model, splits=False)
            parameters = dict(model.named_parameters())
            assert all(grads[name].dtype == parameters[name].dtype for name in grads)
            losses.append(loss.double())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


def test_bf16_weights_beside_fp32_adapters() -> None:
    run_ranks(_low_precision, 2)


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({}, 3, r"tensor: 3 does not divide the model's 8 attention heads; use 1 or 2 or 4 or 8"),
        (
            {"num_kv_heads": 6, "num_heads": 12, "mlp_size": 48},
            4,
            "neither divides the model's 6 key/value heads",
        ),
        ({"num_kv_heads": 1, "head_dim": 6}, 4, "4 processes a key/value head, which do not divide its 6"),
        ({"mlp_size": 25}, 2, "does not divide the feed-forward block's inner size 25; use 1"),
        ({"vocab_size": 9}, 4, "cannot each have a part of a vocabulary of 9 tokens; use 1 or 2"),
    ],
)
def test_a_model_that_cannot_be_cut(change: dict[str, int], tp: int, message: str) -> None:
    check_tensor(LLAMA, 4)
    with pytest.raises(ParallelError, match=message):
        check_tensor(replace(LLAMA, **change), tp)
