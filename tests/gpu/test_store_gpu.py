"""Checkpoints from GPU memory: the copy to the host is finished, and safe, when `save` returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatune.checkpoint import store, writer
from tests.unit.test_store import Alone

pytestmark = pytest.mark.gpu


def test_state_on_the_gpu_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    state = {
        "big": torch.randn(64, 1024, 1024, device="cuda"),
        "half": torch.randn(1000, 77, device="cuda", dtype=torch.bfloat16),
        "host": torch.arange(10),
        "scalar": torch.tensor(2.5, device="cuda"),
    }
    first_buffers: dict[str, int] = {}
    for step in (1, 2):
        for tensor in state.values():
            tensor.add_(step)  # queued right before the copy
        wanted = {name: tensor.clone() for name, tensor in state.items()}
        pending = store.save(tmp_path, step, state, {}, Alone(), keep=store.Keep(2))
        buffers = {name: tensor.data_ptr() for name, tensor in writer._pinned.items()}
        assert all(tensor.is_pinned() for tensor in writer._pinned.values())
        for tensor in state.values():
            tensor.zero_()
        assert buffers == (first_buffers or buffers)  # pinned once
        first_buffers = buffers
        pending.wait()
        store.load(tmp_path / f"step-{step:06d}", state)
        assert all(torch.equal(state[name], wanted[name]) for name in state)
        assert state["big"].is_cuda
    assert first_buffers.keys() == {"big", "half", "scalar"}
