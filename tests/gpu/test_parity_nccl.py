"""The layouts of tests/parallel/test_parity.py over NCCL, in fp32 and bf16, against one process on one GPU.

Tolerances, relative: fp32 losses 1e-4, gradient norms 1e-3, weights 1e-3 (other kernels than one process would pick,
other order of sums); bf16, against bf16 on one GPU, losses 1e-2, gradient norms 5e-2. With MEGATUNE_RESULTS=folder the
errors are written to parity_nccl.json there, with the names of the GPU and of torch.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.helpers.dist import run_ranks
from tests.helpers.layouts import runs_of
from tests.helpers.parity import FAMILIES, Case, Outcome, train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
LIMITS = {"fp32": {"loss": 1e-4, "norm": 1e-3, "weight": 1e-3}, "bf16": {"loss": 1e-2, "norm": 5e-2}}
GPUS = [2, 4]


def _run_all(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Outcome]:
    from megatune import parallel
    from tests.helpers.parity import config_of

    # TensorFloat-32 is off by default; a library may have switched it on.
    torch.backends.cuda.matmul.allow_tf32 = False
    world, section, found = None, None, {}
    for name, case in cases.items():
        if case.parallel != section:
            if world is not None:
                world.close()
            world, section = parallel.init(config_of(case).parallel, device="cuda"), case.parallel
        found[name] = train(case, world=world)
    return found


def _case(family: str, method: str, dtype: str, section: dict, layers: int) -> Case:
    return Case(family, method, section, {"model.dtype": dtype}, layers)


@cache
def alone(family: str) -> dict[str, Outcome]:
    wanted = {(run.method, run.layers) for run in runs_of(family)}
    cases = {
        f"{method}/{dtype}/{layers}": _case(family, method, dtype, {}, layers)
        for method, layers in wanted
        for dtype in LIMITS
    }
    return run_ranks(_run_all, 1, cases, backend="nccl", timeout=300)[0]


def _expected(case: Case) -> Outcome:
    return alone(case.family)[f"{case.method}/{case.changes['model.dtype']}/{case.layers}"]


def _errors(expected: Outcome, found: list[Outcome]) -> dict[str, float]:
    weights, truth = found[0].weights(found[1:]), expected.weights()
    assert weights.keys() == truth.keys()
    relative = [
        float(torch.linalg.vector_norm(weights[name] - tensor) / torch.linalg.vector_norm(tensor))
        for name, tensor in truth.items()
    ]
    pairs = [(one, expected) for one in found]
    return {
        "loss": max(_off(one.losses, true.losses) for one, true in pairs),
        "norm": max(_off(one.norms, true.norms) for one, true in pairs),
        "weight": max(relative),
    }


def _off(values: list[float], truth: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(values, truth, strict=True))


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_over_nccl_equal_one_gpu(family: str, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    cases = {
        f"{run.layout}/{run.method}/{dtype}": _case(family, run.method, dtype, run.section, run.layers)
        for run in runs_of(family)
        if run.processes == gpus
        for dtype in LIMITS
    }
    ranks = run_ranks(_run_all, gpus, cases, backend="nccl", timeout=600)
    errors = {}
    for name, case in cases.items():
        errors[f"{family}/{name}"] = _errors(_expected(case), [found[name] for found in ranks])
    _write(errors)
    wrong = {
        name: found
        for name, found in errors.items()
        if any(found[what] > limit for what, limit in LIMITS[name.rpartition("/")[2]].items())
    }
    norms = {
        name: (ranks[0][name].norms, _expected(case).norms)
        for name, case in cases.items()
        if f"{family}/{name}" in wrong
    }
    assert not wrong, f"{wrong}\nnorms, and of one GPU: {norms}"


def _write(errors: dict[str, dict[str, float]]) -> None:
    folder = os.environ.get("MEGATUNE_RESULTS")
    if not folder:
        return
    path = Path(folder) / "parity_nccl.json"
    result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    result |= {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "limits": LIMITS,
    }
    result["cases"] |= {
        name: {k: float(f"{v:.3g}") for k, v in found.items()} for name, found in errors.items()
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
