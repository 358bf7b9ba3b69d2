"""Recomputed and offloaded activations: the same gradients to the bit, and less memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatune import adapters, ops
from megatune.config.schema import LoraMethod, ParallelConfig
from megatune.models import Decoder, DecoderSpec, LayerSpec, RopeSpec, build, materialise_random
from megatune.models import recompute as recomputing
from megatune.models.recompute import recomputed, selective
from megatune.parallel import World, deferred, offload
from megatune.parallel.offload import Offload
from tests.helpers.families import documents, pair

FAMILIES = ("llama-biases", "gemma2", "qwen3", "olmo2", "gpt2", "mixtral", "gpt-oss", "deepseek-v3")
SPEC = DecoderSpec(
    family="llama",
    vocab_size=300,
    hidden_size=64,
    mlp_size=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    layers=(LayerSpec(),) * 3,
    ropes=(RopeSpec(theta=1e4, dim=8),),
    max_positions=1024,
    attention_scale=8**-0.5,
)
LENGTHS = (90, 1, 89)


@pytest.fixture(autouse=True)
def _small_ones_move_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 256)


def gradients(model: Decoder, lengths: tuple[int, ...] = (9, 14, 8)) -> dict[str, Tensor]:
    model.zero_grad()
    tokens, segments, targets = documents(lengths, model.spec.vocab_size)
    model(tokens, segments, targets).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wide(world: World | None = None, method: LoraMethod | None = None) -> Decoder:
    model = build(SPEC, world)
    if method is not None:
        adapters.attach(model, method)
    materialise_random(model, 0, "cpu", torch.float32)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mode_gives_the_same_gradients(name: str) -> None:
    model = pair(name).ours
    try:
        wanted = gradients(model)
        for mode in ("selective", "full", 2, 1):
            for away in (False, True):
                model.recompute, model.offload = mode, away
                assert same(gradients(model), wanted), (mode, away)
    finally:
        model.recompute, model.offload = "none", False


def test_selective_runs_no_matrix_product_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(F, "linear", counted("product", F.linear))
    for name in ("glu", "rope_qk", "attention"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    model = wide()
    plain = {}
    for mode in ("none", "selective", "full"):
        calls.clear()
        model.recompute = mode
        gradients(model)
        plain[mode] = dict(calls)
    layers = SPEC.num_layers
    assert plain["selective"]["product"] == plain["none"]["product"]
    assert plain["full"]["product"] > plain["none"]["product"]
    for name in ("glu", "rope_qk", "attention"):
        assert plain["none"][name] == layers
        assert plain["selective"][name] == plain["full"][name] == 2 * layers


def kept_bytes(model: Decoder, mode: str | int) -> int:
    """Bytes that wait for backward, by storage; given up ones count nothing."""
    model.recompute = mode
    tokens, segments, targets = documents(LENGTHS, SPEC.vocab_size)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, segments, targets)
    size = sum(storage.nbytes() for key, storage in held.items() if key not in parameters)
    del loss
    return size


def test_each_mode_keeps_what_it_says() -> None:
    model = wide()
    kept = {mode: kept_bytes(model, mode) for mode in ("none", "selective", 2)}
    tokens, layers = sum(LENGTHS), SPEC.num_layers
    per_token = 2 * SPEC.hidden_size * 2 + SPEC.qkv.rows + SPEC.gate_up.rows
    logits = kept["selective"] - 4 * tokens * layers * per_token
    assert (
        0 < logits < 4 * tokens * 5 * SPEC.hidden_size
    )  # of the head, and what norms and attention save beside
    # Given up: q and k after the rotary embedding, the attention's output, the gate's product.
    queries, keys = SPEC.num_heads * SPEC.head_dim, SPEC.num_kv_heads * SPEC.head_dim
    given_up = 4 * tokens * layers * (queries + keys + queries + SPEC.mlp_size)
    assert kept["none"] - kept["selective"] >= given_up
    assert kept[2] < kept["none"] / 2


def test_backward_may_come_after_other_forwards() -> None:
    model = wide()
    batches = [documents(lengths, SPEC.vocab_size, seed) for seed, lengths in enumerate([(100,), LENGTHS])]
    found = {}
    for mode in ("none", "selective", "full"):
        for away in (False, True):
            model.recompute, model.offload = mode, away
            model.zero_grad()
            losses = [model(*batch) for batch in batches]
            for loss in losses:
                loss.backward()
            found[mode, away] = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(same(grads, found["none", False]) for grads in found.values())


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_lora_with_dropout_and_weight_gradients_put_off(schedule: str) -> None:
    world = replace(World.alone(), config=ParallelConfig(pipeline=2, schedule=schedule))
    method = LoraMethod(type="lora", rank=4, dropout=0.3)
    for model in (wide(world), wide(world, method)):
        model.train()
        found = []
        for mode in ("none", "selective", "full", 2):
            for away in (False, True):
                model.recompute, model.offload = mode, away
                model.zero_grad()
                tokens, segments, targets = documents(LENGTHS, SPEC.vocab_size)
                loss = model(tokens, replace(segments, key=7), targets)
                with deferred.collecting() as queue:
                    loss.backward()
                assert bool(len(queue)) == (schedule == "zb-h1")
                queue.run()
                found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        assert all(same(grads, found[0]) for grads in found)


def test_what_is_given_up_is_computed_twice() -> None:
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(x)
        return x.tanh()

    weight = torch.ones(4, requires_grad=True)
    x = torch.ones(4, requires_grad=True)
    with selective(True):
        out = recomputed(inner, lambda y: y * weight, x)
    assert len(seen) == 1
    out.sum().backward()
    assert len(seen) == 2
    out = recomputing.whole_layer(inner, x)
    assert len(seen) == 3
    out.sum().backward()
    assert len(seen) == 4


def test_nothing_is_given_up_without_autograd_or_outside_selective() -> None:
    held = []

    def then(y: Tensor) -> Tensor:
        held.append(y.untyped_storage())
        return y * 2

    x = torch.ones(4, requires_grad=True)
    recomputed(torch.tanh, then, x)
    with selective(True):
        with torch.no_grad():
            recomputed(torch.tanh, then, x)
        recomputed(torch.tanh, then, x.detach())
        assert [storage.nbytes() for storage in held] == [16, 16, 16]
        recomputed(torch.tanh, then, x)
    assert held[-1].nbytes() == 0


def test_no_graph_is_kept_alive_by_a_cycle() -> None:
    def held() -> int:
        return sum(type(thing) is offload._Held for thing in gc.get_objects())

    model = wide()
    gc.collect()
    gc.disable()
    try:
        before = held()
        for mode in ("selective", "full"):
            model.recompute, model.offload = mode, True
            gradients(model, LENGTHS)
        assert held() == before
    finally:
        gc.enable()


def test_compiled_layers_recompute_too() -> None:
    model = wide()
    wanted = gradients(model)
    for layer in model.layers.values():
        layer.compile(backend="aot_eager")
    for mode in ("selective", "full"):
        model.recompute = mode
        found = gradients(model)
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5, msg=f"{mode} {name}")


def test_offload_moves_storages_once_and_leaves_what_is_small_shared_or_a_weight() -> None:
    away = Offload(torch.device("cpu"))
    weight = nn.Parameter(torch.randn(60, 60))
    shared, small = torch.randn(60, 60), torch.randn(10)
    x = torch.randn(60, 60, requires_grad=True)
    away.begin((shared,))
    with away.layer():
        y = x @ weight.t()
        z = (y[:30] * y[30:]).sum() + (y * shared).sum() + (x[0, :10] * small).sum()
    (layer,) = [away._pending]
    sizes = sorted(held.host.nbytes for held in layer.held.values())
    assert sizes == [x.nbytes] * 2  # x and y
    z.backward()
    moved = x.grad.clone()
    x.grad = None
    y = x @ weight.t()
    ((y[:30] * y[30:]).sum() + (y * shared).sum() + (x[0, :10] * small).sum()).backward()
    assert torch.equal(moved, x.grad)
