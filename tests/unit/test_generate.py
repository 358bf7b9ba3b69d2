"""Generation: equal to transformers', to a run without cache, and what sampling and stopping promise."""

from __future__ import annotations

import pytest
import torch

from megatune.errors import ConfigError
from megatune.models import Decoder
from megatune.models.cache import KVCache
from megatune.models.generate import generate, sample
from megatune.ops import Segments
from tests.helpers.families import CASES, pair

PROMPT = [5, 17, 3, 88, 41]


def without_cache(model: Decoder, ids: list[int], new: int) -> list[int]:
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor(ids), Segments.from_lengths((len(ids),)))[-1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_transformers_and_a_run_without_cache(name: str) -> None:
    """20 tokens: windows (7) and LongRoPE's original context (16) are passed on the way."""
    one = pair(name)
    found = list(generate(one.ours, PROMPT, max_new_tokens=20))
    assert found == without_cache(one.ours, PROMPT, 20)
    theirs = one.hf.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert found == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", ["gemma3", "phi3-long"])
def test_every_step_has_the_logits_of_a_run_without_cache(name: str) -> None:
    """More than the most likely token: a key rotated or left out wrongly may not change that one."""
    one = pair(name)
    steps: list[torch.Tensor] = []
    hook = one.ours.register_forward_hook(lambda _module, _inputs, logits: steps.append(logits[-1]))
    found = list(generate(one.ours, PROMPT, max_new_tokens=20))
    hook.remove()
    for length, logits in enumerate(steps, start=len(PROMPT)):
        ids = torch.tensor(PROMPT + found)[:length]
        with torch.no_grad():
            expected = one.ours(ids, Segments.from_lengths((length,)))[-1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert len(steps) == 20


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cache_in_pieces_gives_the_same_logits(name: str) -> None:
    one = pair(name)
    tokens = torch.randint(0, one.spec.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    cache = KVCache(24)
    with torch.no_grad():
        whole = one.ours(tokens, Segments.from_lengths((24,)))
        pieces = [
            one.ours(piece, Segments.from_lengths((len(piece),)), cache=cache)
            for piece in tokens.split([9, 1, 13, 1])
        ]
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)


def test_cache_is_full() -> None:
    one = pair("llama")
    cache = KVCache(3)
    with pytest.raises(ValueError, match="4 tokens do not fit into 3"):
        one.ours(torch.tensor([1, 2, 3, 4]), Segments.from_lengths((4,)), cache=cache)


def test_tokens_come_one_by_one() -> None:
    one = pair("llama")
    stream = generate(one.ours, PROMPT, max_new_tokens=10)
    first = next(stream)
    assert [first, *stream] == list(generate(one.ours, PROMPT, max_new_tokens=10))


def test_stops_before_a_stop_token() -> None:
    one = pair("llama")
    free = list(generate(one.ours, PROMPT, max_new_tokens=10))
    stop = free[4]
    assert list(generate(one.ours, PROMPT, max_new_tokens=10, stop_ids={stop})) == free[: free.index(stop)]


def test_model_and_gradient_mode_are_left_as_they_were() -> None:
    model = pair("llama").ours
    for training in (True, False):
        model.train(training)
        for _ in generate(model, PROMPT, max_new_tokens=2):
            assert torch.is_grad_enabled() and model.training == training


def test_same_seed_same_answer() -> None:
    model = pair("llama").ours
    answers = [
        list(generate(model, PROMPT, max_new_tokens=12, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_cold_temperature_and_a_tiny_nucleus_are_greedy() -> None:
    model = pair("llama").ours
    greedy = list(generate(model, PROMPT, max_new_tokens=8))
    for options in (
        {"temperature": 1e-4},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 1},
    ):
        assert list(generate(model, PROMPT, max_new_tokens=8, **options)) == greedy


def _drawn(logits: torch.Tensor, draws: int = 4000, **options: float) -> torch.Tensor:
    """Share of each token among draws."""
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    generator = torch.Generator().manual_seed(0)
    found = [sample(logits, generator=generator, **settings) for _ in range(draws)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / draws


def test_sampling_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log()
    assert (_drawn(logits) - probabilities).abs().max() < 0.03
    colder = probabilities**2 / (probabilities**2).sum()
    assert (_drawn(logits, temperature=0.5) - colder).abs().max() < 0.03
    assert (_drawn(logits, top_k=2) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.03
    # 0.4 and 0.3 hold less than 0.75: the third is needed; exactly 0.7 needs two (rounded up a little).
    assert (_drawn(logits, top_p=0.75) - torch.tensor([0, 4 / 9, 2 / 9, 3 / 9])).abs().max() < 0.03
    assert (_drawn(logits, top_p=0.69) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.03


@pytest.mark.parametrize(
    "name, prompt, options, words",
    [
        ("llama", [], {}, "prompt is empty"),
        ("llama", PROMPT, {"max_new_tokens": 0}, "max_new_tokens"),
        ("llama", PROMPT, {"temperature": -1.0}, "temperature"),
        ("llama", PROMPT, {"top_p": 0.0}, "top_p"),
        ("llama", PROMPT, {"top_k": -1}, "top_k"),
        ("gpt2", PROMPT, {"max_new_tokens": 60}, "65 tokens.*64 positions"),
    ],
)
def test_odd_calls_are_refused_at_once(name: str, prompt: list[int], options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(pair(name).ours, prompt, **{"max_new_tokens": 3} | options)
