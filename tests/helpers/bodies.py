"""What tests that choose bodies of ops begin and end with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatune import ops


@pytest.fixture(autouse=True)
def same_numbers_and_automatic_bodies() -> Iterator[None]:
    """Every test begins with the same random numbers and leaves the choice of bodies automatic. For a conftest.py,
    which imports it."""
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")
    ops.configure({}, "cuda")
