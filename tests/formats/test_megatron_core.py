"""Legacy checkpoints and Megatron-Core itself: ours computes the same there as in transformers, theirs loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.megatron_legacy import FORMAT
from megatune.checkpoint.convert.megatron_legacy_write import LegacyTarget
from megatune.models.registry import family_for
from tests.helpers import families
from tests.helpers.dist import run_ranks
from tests.helpers.megatron import Tensors, same_tensors
from tests.helpers.megatron_core import logits_and_resaved

pytest.importorskip("megatron.core", reason="needs megatron-core (pip install --no-deps megatron-core)")

# What Megatron's arguments can say; groups of experts are rated by their two best where 4 are chosen in 2 groups.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "llama-biases": {},
    "llama3.1": {
        "rope_parameters": families.LLAMA3 | {"original_max_position_embeddings": 8192},
        "max_position_embeddings": 16384,
    },
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"sliding_window": None},
    "qwen3-moe": {},
    "deepseek-v3": {"num_experts_per_tok": 4},
}


def _hf_model(name: str, changes: dict[str, Any]) -> Any:
    config = families.hf_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = families.hf_from_config(config)
    model.load_state_dict(families.hf_model(name).state_dict())
    return model


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_and_back(tensor: int, tmp_path: Path) -> None:
    """Every family, at one and at two tensor parallel ranks: our files in Megatron's model give transformers' logits,
    and what that model saves comes back bit for bit, its config too."""
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    jobs, sources, expected = [], {}, {}
    for name, changes in CASES.items():
        hf = _hf_model(name, changes)
        state = families.as_in_files(hf, hf.state_dict())
        if hf.config.tie_word_embeddings:
            del state["lm_head.weight"]
        sources[name] = Opened("hf", tmp_path, hf.config.to_dict(), Tensors(state))
        target = LegacyTarget(sources[name], Options(tensor=tensor, vocab_multiple=16), "local")
        for job in target.jobs():
            target.make(job, tmp_path / name)
        jobs.append((tmp_path / name / "release", tmp_path / f"{name}-back", tokens))
        with torch.no_grad():
            expected[name] = hf(tokens).logits
    for found in run_ranks(logits_and_resaved, tensor, jobs):
        for (logits, wrong), (name, wanted) in zip(found, expected.items(), strict=True):
            assert wrong == [], name
            torch.testing.assert_close(
                logits[..., :101], wanted, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, source in sources.items():
        back = FORMAT.open(tmp_path / f"{name}-back", Options())
        assert same_tensors(back.weights, source.weights) == [], name
        assert back.step == 7
        family = family_for(source.hf_config)
        assert family.spec(back.hf_config) == family.spec(source.hf_config), name
