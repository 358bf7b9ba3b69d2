"""Every ZeRO stage on 1, 2 and 4 processes, with and without accumulation: the same run as one process.

Tolerances (fp32): losses 1e-5 relative, gradient norms 1e-4 relative, final weights 1e-4 relative to the largest weight
change (sums over processes are in another order, and AdamW's first steps divide small gradients by themselves).
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.dist import run_ranks
from tests.helpers.runs import LORA, grad_norms, losses, tensors, tiny_config

GLOBAL_BATCH = 16
SETTINGS = [(zero, accumulate) for zero in range(4) for accumulate in (1, 4)]


def _run_all(rank, world_size, model, data, base, method):
    import megatune

    for zero, accumulate in SETTINGS:
        config = tiny_config(
            model,
            data,
            base / f"zero{zero}-accumulate{accumulate}",
            method=method,
            parallel={"zero": zero},
            train__global_batch_size=GLOBAL_BATCH,
            train__micro_batch_size=GLOBAL_BATCH // (world_size * accumulate),
        )
        megatune.train(config)
        dist.barrier()


def _reference(model, data, folder, method, **changes):
    import megatune

    megatune.train(tiny_config(model, data, folder, method=method, **changes))
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def reference(request, tiny_llama, tiny_data, tmp_path_factory):
    method = {"type": "full"} if request.param == "full" else LORA
    folder = tmp_path_factory.mktemp("reference")
    return method, _reference(tiny_llama, tiny_data, folder, method, train__global_batch_size=GLOBAL_BATCH)


def _exported(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(folder / ("adapter" if (folder / "adapter").exists() else "model"))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_equals_one_process(world_size, reference, tiny_llama, tiny_data, tmp_path):
    method, alone = reference
    run_ranks(_run_all, world_size, tiny_llama, tiny_data, tmp_path, method, timeout=300)
    expected, weights = losses(alone), _exported(alone)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == len(SETTINGS)
    for folder in folders:
        assert losses(folder) == pytest.approx(expected, rel=1e-5), folder.name
        assert grad_norms(folder) == pytest.approx(grad_norms(alone), rel=1e-4), folder.name
        found = _exported(folder)
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=f"{folder.name} {name}")


def test_accumulation_on_one_process_equals_one_pass(reference, tiny_llama, tiny_data, tmp_path):
    method, alone = reference
    import megatune

    changes = {"train__global_batch_size": GLOBAL_BATCH, "train__micro_batch_size": GLOBAL_BATCH}
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path, method=method, **changes))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


def _hybrid(rank, world_size, model, data, base):
    import megatune

    for zero in (1, 2, 3):
        config = tiny_config(model, data, base / str(zero), parallel={"zero": zero, "replicate": 2})
        megatune.train(config)
        dist.barrier()


def test_hybrid_sharding_equals_one_process(tiny_llama, tiny_data, tmp_path):
    alone = _reference(tiny_llama, tiny_data, tmp_path / "alone", {"type": "full"})
    run_ranks(_hybrid, 4, tiny_llama, tiny_data, tmp_path / "hybrid", timeout=200)
    for zero in ("1", "2", "3"):
        assert losses(tmp_path / "hybrid" / zero) == pytest.approx(losses(alone), rel=1e-5)
        assert grad_norms(tmp_path / "hybrid" / zero) == pytest.approx(grad_norms(alone), rel=1e-4)


def _dropout(rank, world_size, model, data, base):
    import megatune

    megatune.train(tiny_config(model, data, base, method={**LORA, "dropout": 0.2}, parallel={"zero": 2}))


def test_dropout_does_not_depend_on_the_number_of_processes(tiny_llama, tiny_data, tmp_path):
    import megatune

    method = {**LORA, "dropout": 0.2}
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path / "1", method=method))
    megatune.train(tiny_config(tiny_llama, tiny_data, tmp_path / "plain", method=LORA))
    run_ranks(_dropout, 2, tiny_llama, tiny_data, tmp_path / "2")
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    assert losses(tmp_path / "plain") != pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def _recompute(rank, world_size, model, data, base):
    import megatune

    for recompute in ("full", 2):
        config = tiny_config(model, data, base / str(recompute), parallel={"zero": 3, "recompute": recompute})
        megatune.train(config)
        dist.barrier()


def test_recompute_gives_identical_losses(tiny_llama, tiny_data, tmp_path):
    alone = _reference(tiny_llama, tiny_data, tmp_path / "alone", {"type": "full"})
    run_ranks(_recompute, 2, tiny_llama, tiny_data, tmp_path / "recompute")
    assert losses(tmp_path / "recompute" / "full") == pytest.approx(losses(alone), rel=1e-6)
    assert losses(tmp_path / "recompute" / "2") == losses(tmp_path / "recompute" / "full")
