"""Checkpoints from GPU memory: the state may change once it is staged, in page-locked memory that is used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatune.checkpoint import staging, store
from tests.unit.test_store import Alone

pytestmark = pytest.mark.gpu


def make_state() -> dict[str, torch.Tensor]:
    return {
        "big": torch.randn(64, 1024, 1024, device="cuda"),
        "half": torch.randn(1000, 77, device="cuda", dtype=torch.bfloat16),
        "host": torch.arange(10),
        "scalar": torch.tensor(2.5, device="cuda"),
        "codes": torch.randint(0, 256, (333,), device="cuda", dtype=torch.uint8),
        "transposed": torch.randn(300, 200, device="cuda").T,
    }


def test_state_on_the_gpu_may_change_once_it_is_staged(tmp_path: Path) -> None:
    state = make_state()
    saver = store.Saver(tmp_path, state, Alone(), keep=store.Keep(2))
    saver.prepare()
    places = set()
    for step in (1, 2, 3):
        for tensor in state.values():
            tensor.add_(step)  # queued right before the save
        wanted = {name: tensor.clone() for name, tensor in state.items()}
        pending = saver.save(step, {})
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):  # forward and backward, beside the copy
            busy = busy @ busy * 1e-2
        pending.wait_staged()
        for tensor in state.values():
            tensor.zero_()
        buffer = saver._staging._buffer.bytes
        assert buffer.is_pinned()
        assert buffer.numel() == sum(tensor.nbytes for tensor in state.values())
        places.add(buffer.data_ptr())
        pending.wait()
        store.load(tmp_path / f"step-{step:06d}", state)
        assert all(torch.equal(state[name], wanted[name]) for name in state)
        assert state["big"].is_cuda
    assert len(places) == 1


@pytest.mark.parametrize("background", [True, False])
def test_without_memory_for_a_copy_the_file_is_written_from_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    monkeypatch.setattr(staging, "free_memory", lambda: 100)
    state = make_state()
    state["big"].add_(1)
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    pending = store.Saver(tmp_path, state, Alone()).save(1, {}, background=background)
    pending.wait_staged()
    for tensor in state.values():
        tensor.zero_()
    pending.wait()
    store.load(tmp_path / "step-000001", state)
    assert all(torch.equal(state[name], wanted[name]) for name in state)


def test_page_locked_memory_is_given_back() -> None:
    buffer = staging.HostBuffer(3 * 2**20 + 5, pinned=True)
    assert buffer.bytes.is_pinned()
    locked = buffer._locked
    assert len(locked) == 1
    del buffer
    # The same pages could not be locked twice.
    for _ in range(3):
        staging.HostBuffer(3 * 2**20 + 5, pinned=True)
