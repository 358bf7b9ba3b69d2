"""Fixtures for tests with a real Slurm: `pytest -m slurm tests/slurm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import Cluster, NotHere, running_cluster, why_not


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[Cluster]:
    """The cluster that all tests of a session share."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(running_cluster())
        except NotHere as error:
            pytest.skip(str(error))
        yield cluster


@pytest.fixture
def cluster(running_slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Two idle nodes; sbatch and its like are on this process's PATH."""
    running_slurm.quiet()
    monkeypatch.setenv("PATH", running_slurm.environ["PATH"])
    monkeypatch.setenv("SLURM_CONF", running_slurm.environ["SLURM_CONF"])
    return running_slurm
