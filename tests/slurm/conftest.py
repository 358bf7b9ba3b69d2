"""Fixtures for tests with a real Slurm: `pytest -m slurm tests/slurm`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def running() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Two idle nodes; sbatch and its like are on this process's PATH."""
    running.quiet()
    monkeypatch.setenv("PATH", running.environ["PATH"])
    monkeypatch.setenv("SLURM_CONF", running.environ["SLURM_CONF"])
    return running
