"""Every test here begins with the same random numbers and leaves the choice of bodies automatic."""

from __future__ import annotations

import pytest
import torch

from megatune import ops


@pytest.fixture(autouse=True)
def _same_numbers_and_automatic_bodies():
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")
    ops.configure({}, "cuda")
