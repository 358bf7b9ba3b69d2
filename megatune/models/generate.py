"""Text generation with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from megatune.errors import ConfigError
from megatune.models.cache import KVCache
from megatune.models.decoder import Decoder
from megatune.ops import Segments
from megatune.parallel.tensor import whole_tokens


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Collection[int] = frozenset(),
    device: torch.device | str | None = None,
    forward: Callable[[Tensor, Segments, KVCache], Tensor] | None = None,
) -> Iterator[int]:
    """Token ids that continue the prompt, one by one as they are found.

    Ends after `max_new_tokens`, or before one of `stop_ids`, which is not given out. `temperature` 0: the most likely
    token; else sampling, from the `top_k` most likely tokens (0: all) and of these from the smallest set that holds
    `top_p` of the probability; the same `seed` gives the same answer. `device`: where the model computes; default:
    where its embedding is. `forward`: what gives the logits of (tokens, segments, cache), at least of the last token;
    default: the model (`Pipeline.logits` where it is spread over a pipeline). A sharded model needs the same call on
    every process.
    Raises ConfigError for an empty prompt, options out of range, or more tokens than a model with learned positions
    has.
    """
    _check(model, prompt_ids, max_new_tokens, temperature, top_p, top_k)
    where = torch.device(device) if device is not None else model.embed.weight.device
    call = forward or (lambda tokens, segments, cache: model(tokens, segments, cache=cache))
    return _generate(
        model, call, list(prompt_ids), max_new_tokens, temperature, top_p, top_k, seed, stop_ids, where
    )


def _generate(
    model: Decoder,
    forward: Callable[[Tensor, Segments, KVCache], Tensor],
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop_ids: Collection[int],
    device: torch.device,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(len(ids) + max_new_tokens)
    for _ in range(max_new_tokens):
        if _rotary_changes(model, cache.length, len(ids)):
            cache.clear()
        logits = _next_logits(model, forward, ids[cache.length :], cache, device)
        token = sample(logits, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator)
        # Processes that hold other parts of the model, or copies of it, compute together: rounding must not let one of
        # them stop before the others.
        token = model.world.broadcast(token)
        if token in stop_ids:
            return
        yield token
        ids.append(token)


@whole_tokens()
def _next_logits(
    model: Decoder,
    forward: Callable[[Tensor, Segments, KVCache], Tensor],
    new_ids: list[int],
    cache: KVCache,
    device: torch.device,
) -> Tensor:
    """Logits [V] of the token after `new_ids`, which continue what is in the cache."""
    training = model.training
    if training:
        model.eval()
    tokens = torch.tensor(new_ids, device=device)
    logits = forward(tokens, Segments.from_lengths((len(new_ids),), device), cache)
    if training:
        model.train()
    return logits[-1]


def sample(
    logits: Tensor, *, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> int:
    """One token from logits [V]; see `generate`. Drawn on the CPU, so that all devices draw alike."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.float().cpu() / temperature, -1).sort(
        descending=True, stable=True
    )
    if top_k:
        probabilities, order = probabilities[:top_k], order[:top_k]
        probabilities = probabilities / probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities * (before < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _rotary_changes(model: Decoder, cached: int, total: int) -> bool:
    """Whether cached keys were rotated otherwise than a document of `total` tokens is (LongRoPE's two sets)."""
    borders = (rope.original_max_positions for rope in model.spec.ropes if rope.scaling == "longrope")
    return any(0 < cached <= border < total for border in borders)


def _check(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    if not prompt_ids:
        raise ConfigError("generate: the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise ConfigError(f"generate: max_new_tokens is {max_new_tokens}, must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ConfigError(
            f"generate: temperature {temperature}, top_p {top_p}, top_k {top_k}: temperature and top_k must not be "
            "negative, top_p must be in (0, 1]"
        )
    total = len(prompt_ids) + max_new_tokens
    if model.spec.positions == "learned" and total > model.spec.max_positions:
        raise ConfigError(
            f"generate: prompt and answer may have {total} tokens, but the model has {model.spec.max_positions} "
            "positions; shorten the prompt or max_new_tokens"
        )
