"""Offload on a GPU: the same gradients, less memory at the peak."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from megatune.models import Decoder, DecoderSpec, LayerSpec, RopeSpec, build, materialise_random
from megatune.ops import Segments, Targets

pytestmark = pytest.mark.gpu

SPEC = DecoderSpec(
    family="llama",
    vocab_size=1000,
    hidden_size=1024,
    mlp_size=4096,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    layers=(LayerSpec(),) * 12,
    ropes=(RopeSpec(theta=1e4, dim=64),),
    max_positions=8192,
    attention_scale=64**-0.5,
)
TOKENS = 8192


def step(model: Decoder, mode: str | int, away: bool) -> tuple[dict[str, Tensor], int]:
    """(gradients of two micro-batches, whose backwards come after both forwards; most bytes above the weights)."""
    model.recompute, model.offload = mode, away
    model.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, SPEC.vocab_size, (TOKENS,), generator=generator)
        index = torch.arange(0, TOKENS - 1, 7)
        segments = Segments.from_lengths((TOKENS // 2, TOKENS // 2)).to("cuda")
        losses.append(model(tokens.cuda(), segments, Targets(index, tokens[index + 1]).to("cuda")))
    for loss in losses:
        loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {name: p.grad.clone() for name, p in model.named_parameters()}, peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_the_same_and_the_peak_falls(dtype: torch.dtype) -> None:
    model = build(SPEC)
    materialise_random(model, 0, "cuda", dtype)
    step(model, "none", False)  # whatever is made once
    peaks = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        wanted, _ = step(model, "none", False)
        for mode in ("none", "selective", "full", 3):
            for away in (False, True):
                found, peaks[mode, away] = step(model, mode, away)
                for name, grad in wanted.items():
                    # Attention's backward on a GPU adds in any order.
                    scale = grad.abs().max().item()
                    difference = (found[name] - grad).abs().max().item()
                    assert difference <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * scale, (
                        mode,
                        away,
                        name,
                    )
    finally:
        torch.use_deterministic_algorithms(False)
    weights = sum(p.nbytes for p in model.parameters())  # gradients count in both
    # In fp32 attention keeps whole score matrices while it runs, whatever is kept for backward.
    share = 0.6 if dtype == torch.bfloat16 else 0.75
    for mode in ("none", "selective", 3):
        kept, left = peaks[mode, False] - weights, peaks[mode, True] - weights
        assert left < share * kept, (mode, peaks)
    assert peaks["full", True] <= peaks["full", False]
    assert peaks["selective", False] < 0.85 * peaks["none", False]
    assert peaks["full", False] < peaks["selective", False]
