"""Fixtures for all tests, and what the machine can run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports torch or transformers: two cores, no network, no screen.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
# The CPU's tests are of the CPU also on a machine with GPUs; tests of a GPU are chosen by `-m gpu`.
# (Workers of pytest-xdist inherit what the first process decides.)
if "PYTEST_XDIST_WORKER" not in os.environ and "gpu" not in " ".join(sys.argv).replace("not gpu", ""):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A test starts alone, also when the session itself runs under torchrun or srun.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for _name in (*_LAUNCHERS, *_RANKS):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

_PROCESSES = Path(__file__).parent / "parallel"


def _group(item: pytest.Item) -> str | None:
    """Tests of many processes that one worker runs, one after the other: those of a file, or of a family of models,
    whose layouts share their processes."""
    if _PROCESSES not in item.path.parents:
        return None
    run = getattr(item, "callspec", None) and item.callspec.params.get("run")
    return f"{item.path.stem}-{run.family}" if hasattr(run, "family") else item.path.stem


def pytest_itemcollected(item: pytest.Item) -> None:
    group = _group(item)
    if group is not None:
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest begin at once. What looks at silence and signals comes when the longest are over.
    items.sort(key=lambda item: (_PROCESSES not in item.path.parents, item.path.stem != "test_parity"))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models converted by tests never touch the user's cache; workers of one session share theirs."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    os.environ["MEGATUNE_CACHE"] = str(base / "megatune-cache")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with 2 layers, hidden size 64, random fp32 weights. Read only: all tests share it."""
    from tests.helpers.tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train.jsonl with 64 rows, eval.jsonl with 16) in messages form. Read only."""
    from tests.helpers.tiny import make_data

    return make_data(tmp_path_factory.mktemp("tiny-data"))
