"""One optimizer step: forward and backward of the micro-batches, clipping, update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatune.config.schema import Config
from megatune.data.batch import Batch
from megatune.errors import TrainingError
from megatune.optim import ShardedAdamW, learning_rate
from megatune.parallel import World, set_last_micro_batch

PAD_MULTIPLE = 64  # tokens: wide enough for few different shapes, 6 % of a stream of 512 at worst


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over all scored tokens of the global batch. `grad_norm`: before clipping. `stop`: some process
    was asked to stop."""

    loss: float
    grad_norm: float
    lr: float
    stop: bool


class Trainer:
    """The optimizer step, usable from any loop.

    `model`: wrapped and filled; `optim` over its parameters; `total_steps` fixes the learning rate schedule.
    """

    def __init__(
        self, model: nn.Module, optim: ShardedAdamW, world: World, config: Config, total_steps: int
    ) -> None:
        self.model = model
        self.optim = optim
        self.world = world
        self.config = config
        self.total_steps = total_steps
        self._has_dropout = getattr(config.method, "dropout", 0.0) > 0

    def step(self, batches: Sequence[Batch], target_tokens: int, *, stop: bool = False) -> StepResult:
        """One update from this process's micro-batches.

        `target_tokens`: scored tokens of the global batch, so that the loss is their mean whatever the layout.
        `stop`: this process wants to end; any process's wish comes back to all in the result.
        Raises TrainingError when loss or gradient norm is not finite; weights and optimizer are untouched then.
        """
        step = self.optim.steps
        self.model.train()
        total = 0.0
        for index, batch in enumerate(batches):
            set_last_micro_batch(self.model, self.config.parallel, index == len(batches) - 1)
            if self._has_dropout:
                self._seed_dropout(step, batch)
            batch = batch.padded(PAD_MULTIPLE).to(self.world.device)
            loss = self.model(batch.tokens, batch.segments, batch.targets) / max(1, target_tokens)
            loss.backward()
            total = total + loss.detach()
        # The host's sum over processes needs the numbers anyway: one wait for the device a step, after all its work
        # has been queued.
        grad_norm = self.optim.grad_norm()
        loss_sum, stops = self.world.sum([float(total), float(stop)])
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            self.optim.zero_grad()
            raise TrainingError(f"step {step + 1}: loss {loss_sum}, gradient norm {grad_norm}: not finite")
        clip = self.config.optim.clip
        scale = clip / (grad_norm + 1e-6) if clip and grad_norm > clip else 1.0
        lr = learning_rate(self.config.optim, step, self.total_steps)
        self.optim.step_with(lr, scale)
        return StepResult(loss_sum, grad_norm, lr, stops > 0)

    def _seed_dropout(self, step: int, batch: Batch) -> None:
        """Dropout depends on seed, step and the sequences of the micro-batch, not on the number of processes."""
        key = f"{self.config.train.seed}/{step}/{batch.sequence_ids}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], target_tokens: int, world: World) -> float:
    """Mean loss over the scored tokens of the held-out set; every process gives its share and gets the mean."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        batch = batch.padded(PAD_MULTIPLE).to(world.device)
        total += model(batch.tokens, batch.segments, batch.targets).double().cpu()
    model.train()
    return world.sum([total.item()])[0] / max(1, target_tokens)
