"""The optimizer's step where masters and moments lie in host memory and gradients and weights on a GPU
(`parallel.offload_optimizer`; ZeRO-Offload, arXiv:2101.06840).

In chunks: while the CPU updates one, the gradient of the next is on its way to the host and the new weights of the one
before to the GPU, on a stream for each direction. Host memory beside the states: two chunks of gradients and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatune.optim.rules import Rule, Run

# Elements: 32 MiB of gradients, so that a copy takes about a millisecond. A multiple of the blocks of 8-bit states.
CHUNK = 2**23


@dataclass(eq=False)
class _Staging:
    """Pinned memory that a chunk passes through, and the events after which it is there, and free again."""

    grad: Tensor
    weight: Tensor  # bytes
    arrived: Any = None
    sent: Any = None


class HostUpdate:
    """Updates runs whose masters are on the host and whose gradients and weights are on `device`. On a CPU the copies
    are plain ones (to see that nothing depends on where the tensors lie)."""

    def __init__(self, device: torch.device, largest: int) -> None:
        """`largest`: elements of the largest run."""
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._down = torch.cuda.Stream(device) if self._is_cuda else None
        self._up = torch.cuda.Stream(device) if self._is_cuda else None
        elements = min(CHUNK, largest)
        self._staging = [
            _Staging(
                torch.empty(elements, dtype=torch.float32, pin_memory=self._is_cuda),
                torch.empty(4 * elements, dtype=torch.uint8, pin_memory=self._is_cuda),
            )
            for _ in range(2)
        ]

    def tensors(self) -> list[Tensor]:
        return [tensor for one in self._staging for tensor in (one.grad, one.weight)]

    def update(self, rule: Rule, runs: Sequence[Run], scale: float, lr: float, step: int) -> None:
        """`rule.update` of all runs, whose `weight` is filled. Returns when the last chunk has been computed; what the
        current stream does from then on comes after the last copy."""
        pieces = [
            (run, start, min(start + CHUNK, run.tensor.numel()))
            for run in runs
            for start in range(0, run.tensor.numel(), CHUNK)
        ]
        gradients = {id(run): run.gradient() for run in runs}
        factor = torch.full((), scale, dtype=torch.float32)
        if self._is_cuda:
            # Gradients are complete, and nobody reads the old weights any more.
            current = torch.cuda.current_stream(self._device)
            self._down.wait_stream(current)
            self._up.wait_stream(current)
        self._fetch(self._staging[0], gradients, pieces[0])
        for number, (run, start, stop) in enumerate(pieces):
            mine = self._staging[number % 2]
            if number + 1 < len(pieces):
                self._fetch(self._staging[(number + 1) % 2], gradients, pieces[number + 1])
            for event in (mine.arrived, mine.sent):
                if event is not None:
                    event.synchronize()
            weight = mine.weight.view(run.weight.dtype)[: stop - start]
            part = Run(run.tensor[start:stop], mine.grad[: stop - start], run.decay, run.counts)
            part.slots, part.weight = rule.part(run, start, stop), weight
            rule.update([part], factor, lr, step)
            self._send(mine, weight, run.weight[start:stop])
        if self._is_cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._up)

    def _fetch(self, to: _Staging, gradients: dict[int, Tensor], piece: tuple[Run, int, int]) -> None:
        """Bring a chunk's gradient. The chunk that was in this memory before has been computed."""
        run, start, stop = piece
        source = gradients[id(run)][start:stop]
        if not self._is_cuda:
            to.grad[: stop - start].copy_(source)
            return
        with torch.cuda.stream(self._down):
            to.grad[: stop - start].copy_(source, non_blocking=True)
        to.arrived = self._down.record_event()

    def _send(self, staging: _Staging, weight: Tensor, target: Tensor) -> None:
        if not self._is_cuda:
            target.copy_(weight)
            return
        with torch.cuda.stream(self._up):
            target.copy_(weight, non_blocking=True)
        staging.sent = self._up.record_event()
