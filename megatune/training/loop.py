"""The steps of a run: train, log, evaluate, save, stop."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from megatune import checkpoint
from megatune.config.schema import Config, EarlyStop
from megatune.data import DataModule
from megatune.errors import CheckpointError, TrainingError
from megatune.parallel import World
from megatune.track import Trackers
from megatune.training.folder import RunFolder
from megatune.training.grace import Grace
from megatune.training.heartbeat import CHECKPOINT, END, EVALUATE, SAVE, heartbeat
from megatune.training.signals import StopFlag, stop_requests
from megatune.training.step import Trainer, evaluate


@dataclass
class Progress:
    """What a run has done so far; saved with each checkpoint, so that a resumed run goes on as if it never stopped."""

    step: int = 0
    tokens: int = 0
    loss: float | None = None
    eval_before: float | None = None
    eval_last: float | None = None
    eval_best: float | None = None
    evals_without_gain: int = 0

    def evaluated(self, loss: float, rule: EarlyStop | None) -> bool:
        """Take in an evaluation; True where the early-stop rule ends the run."""
        if self.step == 0:
            self.eval_before = loss
        self.eval_last = loss
        delta = rule.min_delta if rule else 0.0
        if self.eval_best is None or loss < self.eval_best - delta:
            self.eval_best = loss
            self.evals_without_gain = 0
        else:
            self.evals_without_gain += 1
        return rule is not None and self.evals_without_gain >= rule.patience


@dataclass
class Loop:
    """Everything that the steps need; `fit` runs them. `saver`: of the trainer's live state; `flops_per_token` and
    `peak`: for MFU; `facts`: what must not change between two starts of the run."""

    config: Config
    world: World
    folder: RunFolder
    trainer: Trainer
    data: DataModule
    trackers: Trackers
    saver: checkpoint.Saver
    total_steps: int
    flops_per_token: float
    peak: float | None
    facts: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    _pending: checkpoint.PendingSave | None = None
    _grace: Grace = field(init=False)
    _resumed: int = field(init=False)

    def __post_init__(self) -> None:
        self._grace, self._resumed = Grace(self.folder.path), self.progress.step

    def fit(self) -> bool:
        """Run the remaining steps; True where it was stopped before the end (a checkpoint is saved then)."""
        train = self.config.train
        rule = train.early_stop
        if rule is not None and self.progress.evals_without_gain >= rule.patience:
            return False  # stopped early before, and ended before its exports were written
        if self.progress.step == 0 and train.eval_first and self.data.eval is not None:
            self._evaluate()
        with stop_requests() as flag:
            while self.progress.step < self.total_steps:
                stop = self._one_step(flag)
                done = self.progress.step
                last = done == self.total_steps
                over, held_out = False, None
                if self.data.eval is not None and (
                    last or (train.eval_every and done % train.eval_every == 0)
                ):
                    over = self._evaluate()
                    held_out = self.progress.eval_last
                    # It takes long: who was asked to stop meanwhile does not begin another step.
                    stop = self.world.max([float(stop or bool(flag))])[0] > 0
                every = self.config.checkpoint.every
                if last or stop or over or (every and done % every == 0):
                    self._save(held_out, wait=last or stop or over)
                if over and not last:
                    self.trackers.note(f"stopped early at step {done}: eval_loss no longer falls")
                    return False
                if stop and not last:
                    return True
        heartbeat().phase(END)
        return False

    def _one_step(self, flag: StopFlag) -> bool:
        step = self.progress.step
        loader = self.data.train
        began = time.perf_counter()
        heartbeat().begin(step + 1)
        if self._pending is not None:
            self._pending.check()
            self._look_at_save(self._pending)
        try:
            result = self.trainer.step(
                loader.step(step),
                loader.target_tokens(step),
                stop=flag,
                before_update=self._pending.wait_staged if self._pending is not None else None,
            )
        except TrainingError as error:
            self._finish_save()
            safe = checkpoint.newest(self.folder.checkpoints)
            where = f"the last good checkpoint is {safe}" if safe else "no checkpoint was saved yet"
            ids = ", ".join(str(number) for number in loader.sequences(step))
            raise TrainingError(
                f"{error}; packed sequences {ids}; {where}; lower optim.lr (with a new checkpoint.folder) "
                f"or look at these sequences' data"
            ) from error
        seconds = time.perf_counter() - began
        tokens = loader.tokens(step)
        if step > self._resumed:  # the first one also compiles and allocates
            self._grace.step_seconds = max(self._grace.step_seconds, seconds)
        self.progress.step += 1
        heartbeat().finished(self.progress.step)
        self.progress.tokens += tokens
        self.progress.loss = result.loss
        if self.progress.step % self.config.train.log_every == 0 or self.progress.step == self.total_steps:
            rate = tokens / seconds / self.world.world_size
            metrics = {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "tokens": self.progress.tokens,
                "tokens_per_second_per_gpu": rate,
                "mfu": rate * self.flops_per_token / self.peak if self.peak else None,
                "memory_gib": memory_gib(self.world.device),
                "step_seconds": seconds,
            }
            if result.balance is not None:
                metrics["balance_loss"] = result.balance
            self.trackers.log(self.progress.step, metrics)
        return result.stop

    def _evaluate(self) -> bool:
        trainer, held_out = self.trainer, self.data.eval
        heartbeat().phase(EVALUATE)
        began = time.perf_counter()
        loss = evaluate(
            trainer.model, trainer.pipeline, held_out.batches(), held_out.target_tokens, self.world
        )
        self._grace.evaluate_seconds = max(self._grace.evaluate_seconds, time.perf_counter() - began)
        self.trackers.log(self.progress.step, {"eval_loss": loss})
        return self.progress.evaluated(loss, self.config.train.early_stop)

    def _finish_save(self) -> None:
        """Let a save under way end well or badly: the run ends for another reason, which is what is reported."""
        if self._pending is not None:
            with suppress(CheckpointError):
                self._pending.wait()

    def _save(self, held_out: float | None, *, wait: bool) -> None:
        """Start a save; the state is copied, and the files written, behind the next steps unless the caller has to
        wait. `held_out`: the evaluation of this step."""
        beat = heartbeat()
        if self._pending is not None:
            beat.phase(CHECKPOINT)
            self._pending.wait()
            self._look_at_save(self._pending)
        beat.phase(SAVE)
        extra = {**self.facts, "progress": vars(self.progress)}
        self._pending = self.saver.save(self.progress.step, extra, metric=held_out, background=not wait)
        if wait:
            self._look_at_save(self._pending)
            self._pending = None
            beat.phase(CHECKPOINT)
            self.world.barrier()

    def _look_at_save(self, pending: checkpoint.PendingSave) -> None:
        """Once a save is done: tell the launcher, and the scheduler how long stopping takes by now."""
        if not pending.is_done or pending.seconds is None:
            return
        heartbeat().saved(int(pending.folder.name.partition("-")[2]))
        grace, announced = self._grace, self.config.launch.grace
        grace.save_seconds = max(grace.save_seconds, pending.seconds)
        if self.world.is_main and grace.write() and announced is not None and announced < grace.grace_seconds:
            self.trackers.note(
                f"warning: stopping may take {grace.grace_seconds} s, launch.grace is {announced:g} s: a save may "
                f"be cut off then, and the run would go on from the one before"
            )


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
