"""Rotary tables equal transformers' for every kind of scaling, at long range too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatune.models.families.rope_config import rope_from_hf, rope_to_hf
from megatune.models.rope import inverse_frequencies, rotary
from megatune.models.spec import RopeSpec
from megatune.ops import Segments

DIM, MAX_POSITIONS = 64, 131072
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768, "attention_factor": 1.3},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    # The whole ramp falls onto one dimension.
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 4.0,
        "beta_slow": 4.0,
        "truncate": False,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
        "long_factor": [1.0 + 0.5 * i for i in range(DIM // 2)],
        "original_max_position_embeddings": 4096,
    },
    {
        "rope_type": "longrope",
        "factor": 2.0,
        "attention_factor": 1.25,
        "short_factor": [1.0] * (DIM // 2),
        "long_factor": [3.0] * (DIM // 2),
        "original_max_position_embeddings": 4096,
    },
]
THETA = 500000.0


def spec_of(scaling: dict[str, Any]) -> RopeSpec:
    return rope_from_hf(
        scaling, dim=DIM, theta=THETA, max_positions=MAX_POSITIONS, original_max_positions=None
    )


@pytest.mark.parametrize("length", [100, 4096, 40000])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_tables_equal_transformers(scaling: dict[str, Any], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=scaling | {"rope_theta": THETA},
    )
    positions = torch.tensor([0, 1, 7, length // 2, length - 1])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    tables = rotary(spec_of(scaling), positions, (length,))
    assert tables.cos.dtype == torch.float32 and tables.cos.shape == (5, DIM // 2)
    # Frequencies equal to the last bit but one: at position 39,999 that is up to 0.005 radians. 4096 is
    # LongRoPE's original context: the last length with the short factors.
    tolerance = {100: 1e-6, 4096: 5e-4, 40000: 5e-3}[length]
    torch.testing.assert_close(tables.cos, cos[0, :, : DIM // 2], rtol=0, atol=tolerance)
    torch.testing.assert_close(tables.sin, sin[0, :, : DIM // 2], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=lambda scaling: scaling["rope_type"])
def test_scaling_survives_a_config(scaling: dict[str, Any]) -> None:
    rope = spec_of(scaling)
    written = rope_to_hf(rope)
    assert written is not None and spec_of(written) == rope


def test_longrope_is_chosen_document_by_document() -> None:
    rope = spec_of(SCALINGS[-2])
    lengths = (10, 5000, 4096)
    packed = rotary(rope, Segments.from_lengths(lengths).positions, lengths)
    alone = [rotary(rope, Segments.from_lengths((length,)).positions, (length,)) for length in lengths]
    assert torch.equal(packed.cos, torch.cat([one.cos for one in alone]))
    assert torch.equal(packed.sin, torch.cat([one.sin for one in alone]))
    assert not torch.equal(alone[1].cos[:10], alone[0].cos)


def test_frequencies_do_not_depend_on_where_they_are_asked_for() -> None:
    rope = RopeSpec(12345.0, 16)
    with torch.device("meta"):
        first = inverse_frequencies(rope)
    assert first == inverse_frequencies(rope) and len(first) == 8 and first[0] == 1.0


def test_tables_of_some_rows_are_those_of_the_whole_stream() -> None:
    """As context parallelism needs them, with short and long documents in one stream."""
    factors = tuple(float(place + 1) for place in range(4))
    rope = RopeSpec(
        100.0, 8, "longrope", original_max_positions=16, long_factors=factors, short_factors=(1.0,) * 4
    )
    segments = Segments.from_lengths((20, 5, 7))
    whole = rotary(rope, segments.positions, segments.lengths)
    rows = torch.tensor([31, 3, 20, 26, 19])
    some = rotary(rope, segments.positions[rows], segments.lengths, rows)
    assert torch.equal(some.cos, whole.cos[rows]) and torch.equal(some.sin, whole.sin[rows])
    assert not torch.equal(whole.cos[3], whole.cos[20 + 3])
