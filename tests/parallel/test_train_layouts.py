"""Whole runs of `megatune.train` under layouts that cut the model: data, evaluation, answers, checkpoints and exports
as those of one process; a run that was begun under one layout goes on under another.

Tolerances (fp32), relative: losses and evaluations 1e-5, exported weights 1e-5 of their norm; B of LoRA, which starts
at zero and is all change, 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.dist import run_ranks
from tests.helpers.runs import LORA, losses, metrics, tensors, tiny_config

BASE: dict[str, Any] = {
    "train__samples": 2,
    "train__sample_tokens": 8,
    "train__eval_every": 2,
    "train__eval_first": True,
    "optim__eps": 1e-5,
    "checkpoint__every": 2,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"tensor": 2, "pipeline": 2, "zero": 1},
    "cp2-dp2": {"context": 2, "zero": 3},
    "tp2-dp2-zero3": {"tensor": 2, "zero": 3, "recompute": "selective"},
    "pp2-dp2-zbv": {"pipeline": 2, "schedule": "zbv", "stages": [1, 0, 0, 1], "zero": 2, "recompute": "full"},
}


def _run(rank: int, world_size: int, model, data, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    import megatune

    for folder, changes in runs.values():
        megatune.train(tiny_config(model, data, folder, **changes))
        dist.barrier()


def _exports(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{what}/{name}": tensor
        for what in ("model", "merged", "adapter")
        if (folder / what).exists()
        for name, tensor in tensors(folder / what).items()
    }


def _evaluations(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]


def _same_run(folder: Path, alone: Path) -> None:
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    assert _evaluations(folder) == pytest.approx(_evaluations(alone), rel=1e-5)
    found, expected = _exports(folder), _exports(alone)
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        error = torch.linalg.vector_norm(found[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error <= (1e-4 if "lora_B" in name else 1e-5), f"{folder.name}: {name} is off by {error:.1e}"
    mine, theirs = (json.loads((path / "samples.json").read_text()) for path in (folder, alone))
    assert mine == theirs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", [{"type": "full"}, LORA], ids=["full", "lora"])
def test_runs_under_layouts_equal_one_process(method, tiny_llama, tiny_data, tmp_path) -> None:
    import megatune

    alone = tmp_path / "alone"
    megatune.train(tiny_config(tiny_llama, tiny_data, alone, method=method, **BASE))
    runs = {
        name: (tmp_path / name, {"method": method, "parallel": section, **BASE})
        for name, section in LAYOUTS.items()
    }
    run_ranks(_run, 4, tiny_llama, tiny_data, runs, timeout=400)
    for name in LAYOUTS:
        _same_run(tmp_path / name, alone)


@pytest.mark.timeout(600)
def test_a_run_goes_on_under_another_layout(tiny_llama, tiny_data, tmp_path) -> None:
    """Each layout trains two steps more than the one before, in one folder."""
    import megatune

    constant = {**BASE, "optim__schedule": "constant", "optim__warmup": 0, "train__eval_first": False}
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    megatune.train(tiny_config(tiny_llama, tiny_data, alone, **constant, train__steps=8))
    runs = {
        name: (moved, {**constant, "parallel": section, "train__steps": 2 * place + 2})
        for place, (name, section) in enumerate(LAYOUTS.items())
    }
    run_ranks(_run, 4, tiny_llama, tiny_data, runs, timeout=400)
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    found, expected = _exports(moved), _exports(alone)
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        limit = 2e-5 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=limit, msg=name)
