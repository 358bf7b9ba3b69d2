"""The training loss's options: they reach the head from the configuration, and evaluation is without them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatune.config.schema import Config
from megatune.models import DecoderSpec, LayerSpec, RopeSpec, build
from megatune.models.build import materialise_random
from megatune.ops import Segments, Targets
from megatune.parallel import World
from megatune.training import Trainer

SPEC = DecoderSpec(
    family="llama",
    vocab_size=31,
    hidden_size=16,
    mlp_size=24,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerSpec(),),
    ropes=(RopeSpec(theta=10000.0, dim=8),),
    max_positions=64,
    attention_scale=8**-0.5,
)


def test_z_loss_and_label_smoothing_are_of_training_alone() -> None:
    given = {"z_loss": 0.05, "label_smoothing": 0.1}
    config = Config.model_validate(
        {
            "model": {"path": "x"},
            "data": {"train": "x.jsonl"},
            "checkpoint": {"folder": "x"},
            "train": given,
        }
    )
    model = build(SPEC)
    materialise_random(model, seed=1, device="cpu", dtype=torch.float32)
    Trainer(model, None, None, None, World.alone(), config, total_steps=1)
    tokens, segments = torch.arange(9), Segments.from_lengths([9])
    targets = Targets(torch.arange(8), torch.arange(1, 9))
    logits = model(tokens, segments)[:8]
    plain = F.cross_entropy(logits, targets.labels, reduction="sum")
    smooth = F.cross_entropy(logits, targets.labels, reduction="sum", label_smoothing=0.1)
    model.train()
    expected = smooth + 0.05 * logits.logsumexp(1).square().sum()
    torch.testing.assert_close(model(tokens, segments, targets), expected)
    assert expected > plain + 1
    model.eval()
    torch.testing.assert_close(model(tokens, segments, targets), plain)
