"""One optimizer step: forward and backward of the micro-batches, clipping, update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatune.config.schema import Config
from megatune.data.batch import Batch
from megatune.errors import TrainingError
from megatune.models import Decoder
from megatune.models.moe import set_balance, take_aux, update_correction
from megatune.optim import ShardedOptimizer, learning_rate
from megatune.parallel import World, Zero
from megatune.parallel.context import MicroBatch, shard_stream
from megatune.parallel.pipeline import Pipeline
from megatune.training.heartbeat import BACKWARD, EVALUATE, FORWARD, OPTIMIZER, REDUCE, heartbeat
from megatune.training.signals import StopFlag

PAD_MULTIPLE = 64  # tokens: wide enough for few different shapes, 6 % of a stream of 512 at worst


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over all scored tokens of the global batch, with z-loss and label smoothing where they are on.
    `grad_norm`: before clipping. `balance`: the experts' balancing loss, which is not in `loss`; None where there is
    none. `stop`: some process was asked to stop."""

    loss: float
    grad_norm: float
    lr: float
    balance: float | None
    stop: bool


class Trainer:
    """The optimizer step, usable from any loop.

    `model`: sharded by `zero` and filled; `optim` over its masters; `total_steps` fixes the learning rate schedule.
    """

    def __init__(
        self,
        model: Decoder,
        zero: Zero,
        optim: ShardedOptimizer,
        pipeline: Pipeline,
        world: World,
        config: Config,
        total_steps: int,
    ) -> None:
        self.model, self.zero, self.optim, self.pipeline = model, zero, optim, pipeline
        self.world = world
        self.config = config
        self.total_steps = total_steps
        train = config.train
        model.z_loss, model.label_smoothing = train.z_loss, train.label_smoothing
        set_balance(model, config.moe, train.global_batch_size // train.micro_batch_size)
        self.beat = beat = heartbeat()
        model.register_forward_pre_hook(lambda it, _: beat.phase(FORWARD if it.training else EVALUATE))

    def step(
        self,
        batches: Sequence[Batch],
        target_tokens: int,
        *,
        stop: bool | StopFlag = False,
        before_update: Callable[[], None] | None = None,
    ) -> StepResult:
        """One update from this process's micro-batches.

        `target_tokens`: scored tokens of the global batch, so that the loss is their mean whatever the layout.
        `stop`: this process wants to end (asked after backward); any process's wish comes back to all in the result.
        `before_update`: called when weights and optimizer states are about to change, for the first time in this step.
        Raises TrainingError when loss or gradient norm is not finite; weights and optimizer are untouched then.
        """
        step = self.optim.steps
        self.model.train()
        micro_batches = [prepare(batch, self.world, self._key(step, batch)) for batch in batches]
        loss = self.pipeline.train(micro_batches, 1 / max(1, target_tokens), self._begin_backward)
        self.beat.phase(REDUCE)
        self.zero.finish()
        # The host's sum over processes needs the numbers anyway: one wait for the device a step, after all its work
        # has been queued. Processes of a tensor parallel line have the same loss, and gradients that they all hold
        # are counted by the first.
        mine = float(loss) if self.world.tp.is_first else 0.0
        has_balance = self.config.moe.aux_loss > 0
        balance = take_aux(self.model, self.world) if has_balance else 0.0
        sums = self.world.sum([mine, self.optim.grad_square(), balance, float(bool(stop))])
        loss_sum, square, balance, stops = sums
        grad_norm = math.sqrt(square) if math.isfinite(square) else square
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            self.zero.zero_grad()
            raise TrainingError(f"step {step + 1}: loss {loss_sum}, gradient norm {grad_norm}: not finite")
        self.beat.phase(OPTIMIZER)
        clip = self.config.optim.clip
        scale = clip / (grad_norm + 1e-6) if clip and grad_norm > clip else 1.0
        lr = learning_rate(self.config.optim, step, self.total_steps)
        if before_update is not None:
            before_update()
        self.optim.step_with(lr, scale)
        self.zero.zero_grad()
        self.zero.publish()
        if self.config.moe.bias_rate:
            update_correction(self.model, self.world, self.config.moe.bias_rate)
        return StepResult(loss_sum, grad_norm, lr, balance if has_balance else None, stops > 0)

    def _begin_backward(self, stage: int, is_last: bool) -> None:
        self.beat.phase(BACKWARD)
        self.zero.begin_backward(stage, is_last)

    def _key(self, step: int, batch: Batch) -> int:
        """Dropout depends on seed, step and the sequences of the micro-batch, not on the layout."""
        text = f"{self.config.train.seed}/{step}/{batch.sequence_ids}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def prepare(batch: Batch, world: World, key: int = 0) -> MicroBatch:
    """This process's tokens of a micro-batch, padded so that the layout cuts them evenly, on its device."""
    batch = batch.padded(math.lcm(PAD_MULTIPLE, world.token_multiple))
    # Cut on the host: choosing targets on a device would make the host wait for it.
    mine = shard_stream(batch.tokens, replace(batch.segments, key=key), batch.targets, world.cp)
    device = world.device
    return MicroBatch(mine.tokens.to(device), mine.segments.to(device), mine.targets.to(device))


@torch.no_grad()
def evaluate(
    model: Decoder, pipeline: Pipeline, batches: Sequence[Batch], target_tokens: int, world: World
) -> float:
    """Mean loss over the scored tokens of the held-out set; every process gives its share and gets the mean."""
    model.eval()
    # As many at a time as fill the pipeline: the held-out set need not fit into memory.
    together = 4 * world.pp.size
    total = 0.0
    for start in range(0, len(batches), together):
        some = [batches[number] for number in range(start, min(start + together, len(batches)))]
        total += float(pipeline.evaluate([prepare(batch, world) for batch in some]))
    model.train()
    mine = total if world.tp.is_first else 0.0
    return world.sum([mine])[0] / max(1, target_tokens)
