"""8-bit AdamW, AdamW on bf16 weights, Lion and Muon: two processes as one, and resumed as never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatune.config.schema import OptimConfig
from megatune.errors import ConfigError
from megatune.optim import build
from megatune.parallel import Master, ShardSpec
from megatune.parallel.shard import Cut
from tests.helpers.dist import run_ranks
from tests.helpers.runs import losses, tensors, tiny_config

NAMES = ("adamw_8bit", "lion", "muon")
COMMON = {"optim__lr": 1e-3, "optim__weight_decay": 0.1, "train__steps": 4, "train__samples": 0}
# Two sums of two gradients, and no factor that depends on a norm: the same bits on two processes as on one.
LOW = COMMON | {
    "optim__name": "adamw_bf16",
    "optim__clip": 0.0,
    "model__dtype": "bf16",
    "train__global_batch_size": 2,
    "checkpoint__every": 2,
}


def _train(rank: int, world_size: int, model, data, folder: Path) -> None:
    import megatune

    for zero, name in zip((1, 0, 2), NAMES, strict=True):
        # Lion's masters lie in host memory: nothing depends on it.
        section = {"parallel": {"zero": zero, "offload_optimizer": name == "lion"}, "optim__name": name}
        megatune.train(tiny_config(model, data, folder / name, **COMMON | section))
        dist.barrier()
    for zero, tensor in ((2, 1), (0, 2)):
        section = {"parallel": {"zero": zero, "tensor": tensor}}
        megatune.train(tiny_config(model, data, folder / f"low{tensor}", **LOW | section))
        dist.barrier()


@pytest.mark.timeout(300)
def test_two_processes_equal_one_and_a_resumed_run_one_that_never_stopped(
    tiny_llama, tiny_data, tmp_path
) -> None:
    import megatune

    run_ranks(_train, 2, tiny_llama, tiny_data, tmp_path / "two", timeout=200)
    for name in NAMES:
        alone = tmp_path / "alone" / name
        changes = COMMON | {"optim__name": name, "parallel": {"zero": 1}, "checkpoint__every": 2}
        config = tiny_config(tiny_llama, tiny_data, alone, **changes)
        megatune.train(config)
        expected, all_losses = tensors(alone / "model"), losses(alone)
        steps = sorted((alone / "checkpoints").glob("step-*"))
        assert len(steps) == 2
        # As if it had been killed after step 2.
        shutil.rmtree(steps[1])
        shutil.rmtree(alone / "model")
        (alone / "summary.json").unlink()
        megatune.train(config)
        found = tensors(alone / "model")
        assert expected and all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
        assert losses(alone) == all_losses
        # Sums of gradients in another order: a sign or a code that lies on a border may differ.
        assert losses(tmp_path / "two" / name) == pytest.approx(losses(alone), rel=1e-4)
    _bf16_weights(tiny_llama, tiny_data, tmp_path)


def _bf16_weights(model: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Alone, on two processes, and begun on two and ended alone: the same bits."""
    import megatune

    config = tiny_config(model, data, tmp_path / "low", **LOW | {"parallel": {"zero": 0}})
    megatune.train(config)
    expected = tensors(tmp_path / "low/model")
    newest = sorted((tmp_path / "low/checkpoints").glob("step-*"))[-1]
    saved = tensors(newest)
    kinds = {(name.split("/")[0], tensor.ndim > 1, tensor.dtype) for name, tensor in saved.items()}
    single = {(what, is_matrix, torch.float32) for what in ("optim", "model") for is_matrix in (False, True)}
    assert kinds == single - {("model", True, torch.float32)} | {("model", True, torch.bfloat16)}
    two = tmp_path / "two/low1"
    assert all(torch.equal(tensors(two / "model")[key], tensor) for key, tensor in expected.items())
    # Tensor parallel sums are other sums.
    assert losses(tmp_path / "two/low2") == pytest.approx(losses(tmp_path / "low"), rel=2e-2)
    shutil.rmtree(sorted((two / "checkpoints").glob("step-*"))[1])
    shutil.rmtree(two / "model")
    (two / "summary.json").unlink()
    megatune.train(tiny_config(model, data, two, **LOW | {"parallel": {"zero": 0}}))
    assert all(torch.equal(tensors(two / "model")[key], tensor) for key, tensor in expected.items())


def test_what_a_layout_cuts_apart_is_refused() -> None:
    spec = ShardSpec("layers.0.up.weight", (96, 96), 0)
    half = Master(spec.name, spec, torch.zeros(48 * 96), None, True, Cut(tp=(0, 2)))
    for name in ("adamw_8bit", "muon"):
        with pytest.raises(ConfigError, match=rf"optim.name: {name} .* cuts layers.0.up.weight \[96, 96\]"):
            build({spec.name: half}, OptimConfig(name=name))
