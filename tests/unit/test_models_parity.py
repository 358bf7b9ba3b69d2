"""Logits and gradients of every family equal transformers', fp32, to 1e-5 of the largest value of each tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from megatune.models import Decoder, build, from_hf_state
from megatune.ops import Segments, Targets
from megatune.parallel.stages import cut
from tests.helpers.families import CASES, MOE_CASES, Pair, as_in_files, documents, pair

# Longer than the windows (7); for LongRoPE on both sides of the original context (16).
LENGTHS = (23, 1, 12, 19)


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape, what
    largest = expected.abs().max()
    assert (found - expected).abs().max() <= tolerance * largest, (
        f"{what}: {(found - expected).abs().max() / largest}"
    )


def hf_loss_and_gradients(
    one: Pair, tokens: Tensor, lengths: tuple[int, ...]
) -> tuple[float, dict[str, Tensor]]:
    """Sum of the loss over the documents, each run by itself, and gradients by our names."""
    one.hf.zero_grad()
    total = 0.0
    for document in tokens.split(lengths):
        if len(document) > 1:
            logits = one.hf(document[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
            loss.backward()
            total += loss.item()
    gradients = {name: parameter.grad for name, parameter in one.hf.named_parameters()}
    gradients |= {name: buffer for name, buffer in one.hf.named_buffers() if name in one.hf.state_dict()}
    expected = from_hf_state(one.spec, one.family, as_in_files(one.hf, gradients))
    return total, {name: value for name, value in expected.items() if not name.endswith("correction")}


@pytest.mark.parametrize("name", CASES)
def test_logits_of_one_document(name: str) -> None:
    one = pair(name)
    tokens, segments, _ = documents((29,), one.spec.vocab_size)
    with torch.no_grad():
        assert_close(one.ours(tokens, segments), one.hf(tokens[None]).logits[0], "logits")


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_equal_separate_runs(name: str) -> None:
    one = pair(name)
    tokens, segments, _ = documents(LENGTHS, one.spec.vocab_size)
    with torch.no_grad():
        expected = torch.cat([one.hf(document[None]).logits[0] for document in tokens.split(LENGTHS)])
        assert_close(one.ours(tokens, segments), expected, "logits")


@pytest.mark.parametrize("lengths", [(29,), LENGTHS], ids=["single", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(name: str, lengths: tuple[int, ...]) -> None:
    one = pair(name)
    tokens, segments, targets = documents(lengths, one.spec.vocab_size)
    expected_loss, expected = hf_loss_and_gradients(one, tokens, lengths)
    one.ours.zero_grad()
    loss = one.ours(tokens, segments, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    loss.backward()
    found = {
        name: parameter.grad for name, parameter in one.ours.named_parameters() if parameter.requires_grad
    }
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert_close(gradient, expected[key], key)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_token_sees_exactly_its_window(name: str) -> None:
    """Changing the token just outside the window of all layers together changes nothing, just inside it does."""
    one = pair(name)
    spec = one.spec
    reach = sum(layer.window - 1 for layer in spec.layers if layer.window) if name == "mistral" else None
    tokens, segments, _ = documents((29,), spec.vocab_size)
    last = [_last_logits(one.ours, tokens, at, segments) for at in range(29)]
    changed = [bool((row != one.ours(tokens, segments)[-1]).any()) for row in last]
    assert changed == [at >= 28 - reach for at in range(29)] if reach else all(changed)


@torch.no_grad()
def _last_logits(model: Decoder, tokens: Tensor, at: int, segments: Segments) -> Tensor:
    other = tokens.clone()
    other[at] = (other[at] + 1) % model.spec.vocab_size
    return model(other, segments)[-1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "deepseek-v3", "gpt-oss"])
def test_pipeline_stages_equal_the_whole(name: str) -> None:
    one = pair(name)
    tokens, segments, targets = documents(LENGTHS, one.spec.vocab_size)
    middle = one.spec.num_layers // 2
    stages = [build(one.spec, stages=[stage]) for stage in cut([middle, one.spec.num_layers - middle])]
    for stage in stages:
        stage.to_empty(device="cpu")
        state = one.ours.state_dict()
        stage.load_state_dict({key: state[key] for key in stage.state_dict()})
    first, last = stages
    assert set(first.state_dict()) | set(last.state_dict()) == set(one.ours.state_dict())
    with torch.no_grad():
        hidden = first(tokens, segments)
        assert hidden.shape == (len(tokens), one.spec.hidden_size)
        assert torch.equal(last(hidden, segments, targets), one.ours(tokens, segments, targets))


@pytest.mark.parametrize("every", [1, 2])
def test_recompute_changes_no_gradient(every: int) -> None:
    one = pair("gemma3")
    tokens, segments, targets = documents(LENGTHS, one.spec.vocab_size)
    gradients = []
    for recompute in (0, every):
        one.ours.zero_grad()
        one.ours.recompute = recompute or "none"
        calls = _count_calls(one.ours, tokens, segments, targets)
        gradients.append({key: parameter.grad.clone() for key, parameter in one.ours.named_parameters()})
    one.ours.recompute = "none"
    # Checkpointed layers run twice.
    assert calls == [2 if index % every == 0 else 1 for index in range(one.spec.num_layers)]
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def _count_calls(model: Decoder, tokens: Tensor, segments: Segments, targets: Targets) -> list[int]:
    calls = [0] * len(model.layers)

    def counter(index: int):
        def count(*_: object) -> None:
            calls[index] += 1

        return count

    handles = [
        layer.register_forward_pre_hook(counter(index)) for index, layer in enumerate(model.layers.values())
    ]
    model(tokens, segments, targets).backward()
    for handle in handles:
        handle.remove()
    return calls


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    one = pair("llama")
    tokens, segments, _ = documents((5,), one.spec.vocab_size)
    nothing = torch.empty(0, dtype=torch.int64)
    one.ours.zero_grad()
    loss = one.ours(tokens, segments, Targets(nothing, nothing))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in one.ours.parameters() if parameter.grad is not None)


def test_bf16_logits_are_bf16_and_close_to_fp32() -> None:
    one = pair("gemma3")
    tokens, segments, _ = documents((29,), one.spec.vocab_size)
    ours = build(one.spec).to_empty(device="cpu").to(torch.bfloat16)
    ours.load_state_dict(one.ours.state_dict())
    with torch.no_grad():
        logits = ours(tokens, segments)
        exact = one.ours(tokens, segments)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), exact, "bf16 logits", tolerance=0.06)


@pytest.mark.parametrize("name", MOE_CASES)
def test_mixtures_in_bf16_are_close_to_fp32(name: str) -> None:
    """Of most tokens: where two experts are nearly as good, rounding may choose the other one."""
    one = pair(name)
    tokens, segments, targets = documents((29,), one.spec.vocab_size)
    ours = build(one.spec).to_empty(device="cpu").to(torch.bfloat16)
    ours.load_state_dict(one.ours.state_dict())
    ours(tokens, segments, targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())
    with torch.no_grad():
        logits, exact = ours(tokens, segments), one.ours(tokens, segments)
    assert logits.dtype == torch.bfloat16
    worst = (logits.float() - exact).abs().amax(1) / exact.abs().max()
    assert worst.median() < 0.03


def test_the_embedding_scale_is_rounded_as_by_transformers() -> None:
    one = pair("gemma3")
    tokens, segments, _ = documents((29,), one.spec.vocab_size)
    ours = build(one.spec).to_empty(device="cpu").to(torch.bfloat16)
    ours.load_state_dict(one.ours.state_dict())
    seen = []
    ours.layers["0"].register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        ours(tokens, segments)
        theirs = copy.deepcopy(one.hf.model.embed_tokens).to(torch.bfloat16)
        exact = one.hf.model.embed_tokens(tokens)
        assert torch.equal(seen[0], theirs(tokens))
        assert not torch.equal(seen[0], exact.bfloat16())
