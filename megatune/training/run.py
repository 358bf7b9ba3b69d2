"""A run from configuration to tuned model; wires the rooms together, reads like the way of the data."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatune import adapters, checkpoint, data, models, ops, parallel, track
from megatune.config.loader import config_as_dict
from megatune.config.schema import CheckpointConfig, Config
from megatune.data.tokenizer import Tokenizer, load_tokenizer
from megatune.errors import CheckpointError, DataError
from megatune.parallel.shard import Parts
from megatune.training.assemble import assemble, training_parts
from megatune.training.folder import RunFolder, goal, read_json, write_atomically
from megatune.training.layout import check as check_layout
from megatune.training.layout import describe as describe_layout
from megatune.training.loop import Loop, Progress
from megatune.training.precision import check_fp8, check_masters, compute_dtype, masters, peak_flops
from megatune.training.samples import answers
from megatune.training.siblings import neighbours_watched
from megatune.training.signals import stop_requests
from megatune.training.step import Trainer


@dataclass(frozen=True)
class TrainResult:
    """`loss` of the last step, `eval_before` and `eval_after` on the held-out set (None where there is none),
    `exports` by kind; `stopped`: ended by a signal before the last step, a checkpoint is saved."""

    folder: Path
    step: int
    loss: float | None
    eval_before: float | None
    eval_after: float | None
    stopped: bool
    exports: dict[str, Path] = field(default_factory=dict)


def train(config: Config) -> TrainResult:
    """Run `config` in this process and the others of its process group (torchrun's variables; else alone).

    Goes on from the newest valid checkpoint in the run's folder. Raises a MegatuneError for anything that the user
    can mend, before a GPU is used where possible.
    """
    with stop_requests():
        world = parallel.init(config.parallel, timeout=config.launch.timeout)
        try:
            with neighbours_watched(world):
                return _Run(config, world).run()
        finally:
            world.close()


class _Run:
    def __init__(self, config: Config, world: parallel.World) -> None:
        self.config = config
        self.world = world
        self.folder = RunFolder(config.checkpoint.folder)
        self.dtype = compute_dtype(config.model.dtype, world.device)
        check_fp8(config.model.fp8, world.device)
        check_masters(config, self.dtype)

    def run(self) -> TrainResult:
        config, world = self.config, self.world
        done = None
        if world.is_main:
            self.folder.claim(config)
            done = self.folder.finished(config)
        done = world.broadcast(done)
        if done is not None:
            exports = {what: Path(path) for what, path in done["exports"].items()}
            before, after = done["eval_before"], done["eval_after"]
            return TrainResult(self.folder.path, done["step"], done["loss"], before, after, False, exports)
        trackers = track.build(config, self.folder.path, world)
        try:
            return self._run(trackers)
        except BaseException as error:
            trackers.failed(error)
            raise
        finally:
            trackers.close()

    def _run(self, trackers: track.Trackers) -> TrainResult:
        config, world = self.config, self.world
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.train.seed)
        ops.configure(config.ops.backend, world.device, self.dtype)
        source = self._first_on_node(lambda: checkpoint.resolve_model(config.model.path, config.model.cache))
        tokenizer = load_tokenizer(source.path)
        trackers.note("reading the training data")
        module = self._data(tokenizer, source.spec.vocab_size)
        total_steps = self._total_steps(module)
        check_layout(config, source.spec, world.world_size)
        built = assemble(source.spec, config, world, self.dtype)
        zero = built.zero
        frozen = models.FrozenParts(built.model)
        checkpoint.load_pretrained(
            zero.weights(), source.spec, source, seed=config.train.seed, quantised=frozen
        )
        optimizer, pipeline, state = training_parts(built, config, world, self.dtype)
        facts = {"base": source.digest, "data": module.digest, "seed": config.train.seed}
        progress = self._restore(state, optimizer, facts, trackers)
        zero.publish()
        trainer = Trainer(built.model, zero, optimizer, pipeline, world, config, total_steps)
        loop = self._loop(trainer, module, trackers, state, source, facts, progress)
        self._check_space(state, source, total_steps)
        trackers.start(config_as_dict(config), progress.step, total_steps)
        trackers.header(self._header(source, module, total_steps))
        before = self._samples("before", pipeline, tokenizer, trackers, progress.step == 0)
        stopped = loop.fit()
        exports: dict[str, Path] = {}
        after: list[dict[str, str]] = []
        if not stopped:
            after = self._samples("after", pipeline, tokenizer, trackers, True)
            exports = self._export(ChainMap(zero.weights(), frozen), source, trackers)
        result = TrainResult(
            self.folder.path,
            loop.progress.step,
            loop.progress.loss,
            loop.progress.eval_before,
            loop.progress.eval_last,
            stopped,
            exports,
        )
        if world.is_main:
            self._finish(result, total_steps, before, after, trackers)
        zero.close()
        world.barrier()
        return result

    def _first_on_node(self, work):
        """`work()` on the first process of each node, then on the others, which find its result in the cache."""
        if self.world.local_rank == 0:
            found = work()
        self.world.barrier()
        return found if self.world.local_rank == 0 else work()

    def _data(self, tokenizer: Tokenizer, vocab_size: int) -> data.DataModule:
        config, world = self.config, self.world
        if world.is_main:
            data.prepare(config, tokenizer, self.folder.path)
        world.barrier()
        module = data.build(
            config, tokenizer, dp_rank=world.dp_rank, dp_size=world.dp_size, folder=self.folder.path
        )
        caches = [loader.cache for loader in (module.train, module.eval) if loader is not None]
        largest = world.broadcast(max(cache.largest_token() for cache in caches) if world.is_main else None)
        if largest >= vocab_size:
            raise DataError(
                f"the tokenizer gives token {largest}, but model.path has an embedding of {vocab_size} rows: tokenizer "
                f"and weights are not of one model"
            )
        return module

    def _total_steps(self, module: data.DataModule) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        return max(1, round(train.epochs * module.train.steps_per_epoch()))

    def _whole(self, source: checkpoint.ModelFolder) -> models.Decoder:
        """The whole model, without memory: says what there is, under any layout."""
        whole = models.build(source.spec)
        adapters.attach(whole, self.config.method)
        return whole

    def _restore(self, state, optimizer, facts: dict[str, Any], trackers: track.Trackers) -> Progress:
        """Progress of the newest valid checkpoint, its tensors filled into `state`; a fresh one where there is none."""
        if self.config.checkpoint.resume == "never":
            if checkpoint.newest(self.folder.checkpoints) is not None:
                raise CheckpointError(
                    f"checkpoint.resume: never, but {self.folder.checkpoints} holds checkpoints; remove them, choose "
                    f"another checkpoint.folder, or set resume: auto to go on from them"
                )
            return self._start(state, optimizer, trackers)
        found = checkpoint.restore(self.folder.checkpoints, state, self.world, warn=trackers.note)
        if found is None:
            return self._start(state, optimizer, trackers)
        newest, extra = found
        for key, now in facts.items():
            if extra.get(key) != now:
                what = {
                    "base": "model.path has other weights",
                    "data": "the training data or tokenizer changed",
                }
                raise CheckpointError(
                    f"{newest} was trained from something else: {what.get(key, key)}; restore it, or choose another "
                    f"checkpoint.folder"
                )
        try:
            progress = Progress(**extra["progress"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{newest} does not say how far its run was ({error!r:.200})") from error
        if self.config.train.steps is not None and progress.step > self.config.train.steps:
            raise CheckpointError(
                f"{newest} is of step {progress.step}, train.steps is {self.config.train.steps}: raise it, or choose "
                f"another checkpoint.folder"
            )
        optimizer.load_steps(progress.step)
        trackers.note(f"resuming from {newest} (step {progress.step})")
        return progress

    def _start(self, state, optimizer, trackers: track.Trackers) -> Progress:
        """Where a run without checkpoints begins: at step 0, or with what `checkpoint.start` holds."""
        start = self.config.checkpoint.start
        if start is None:
            return Progress()
        newest = checkpoint.newest(Path(start) / "checkpoints", trackers.note)
        if newest is None:
            raise CheckpointError(
                f"checkpoint.start: {start} holds no whole checkpoint; make one with `megatune convert --to megatune`"
            )
        progress = Progress(step=checkpoint.load(newest, state)["progress"]["step"])
        if self.config.train.steps is not None and progress.step >= self.config.train.steps:
            raise CheckpointError(
                f"checkpoint.start: {newest} is of step {progress.step}, train.steps is {self.config.train.steps}: "
                "raise it"
            )
        optimizer.load_steps(progress.step)
        trackers.note(f"starting from {newest} (step {progress.step})")
        return progress

    def _loop(self, trainer, module, trackers, state, source, facts, progress) -> Loop:
        config = self.config
        checkpoints = config.checkpoint
        saver = checkpoint.Saver(
            self.folder.checkpoints,
            state,
            self.world,
            keep=checkpoint.Keep(checkpoints.keep_last, checkpoints.keep_every, checkpoints.keep_best),
            warn=trackers.note,
        )
        if checkpoints.every:
            saver.prepare()
        return Loop(
            config=config,
            world=self.world,
            folder=self.folder,
            trainer=trainer,
            data=module,
            trackers=trackers,
            saver=saver,
            total_steps=trainer.total_steps,
            flops_per_token=models.flops_per_token(
                source.spec, config.data.seq_length, frozen=config.method.type == "lora"
            ),
            peak=peak_flops(self.world.device),
            facts=facts,
            progress=progress,
        )

    def _check_space(self, state: dict[str, Parts], source: checkpoint.ModelFolder, total_steps: int) -> None:
        """Refuse before the first step what would fill the disk at the last one."""
        (one,) = self.world.sum([checkpoint.written_bytes(state)])
        if not self.world.is_main:
            return
        weights = models.count_parameters(source.spec) * self.dtype.itemsize
        whole = [what for what in self.config.checkpoint.export if what != "adapter"]
        kept = _most_kept(self.config.checkpoint, total_steps)
        # What lies there already is replaced as the run goes on.
        there = min(len(list(self.folder.checkpoints.glob("step-*"))), kept - 1)
        needed = one * (kept - there) + weights * sum(not self.folder.export(what).exists() for what in whole)
        checkpoint.check_space(self.folder.path, int(needed))

    def _header(self, source, module, total_steps: int) -> dict[str, str]:
        config, world = self.config, self.world
        trainable, total = adapters.describe(self._whole(source))
        bodies = ", ".join(f"{op} {body}" for op, body, _ in ops.table(world.device, self.dtype))
        return {
            "model": f"{config.model.path} ({source.spec.family}, {total / 1e6:,.1f} M parameters)",
            "method": f"{config.method.type}, {trainable / 1e6:,.2f} M trainable ({trainable / total:.2%})",
            "layout": describe_layout(config, source.spec, world.layout, world.device.type),
            "compute": f"{str(self.dtype).removeprefix('torch.')}, masters {masters(config)}; {bodies}",
            "data": module.describe(),
            "steps": f"{total_steps} of {config.train.global_batch_size} sequences x {config.data.seq_length} tokens",
            "folder": str(self.folder.path),
        }

    def _samples(self, when: str, pipeline, tokenizer, trackers, make: bool) -> list[dict[str, str]]:
        """Answers to held-out prompts, before or after; those of before are kept for a resumed run."""
        if not self.config.train.samples:
            return []
        if not make:
            return (read_json(self.folder.samples) or {}).get(when, [])
        found = answers(pipeline, tokenizer, self.config, self.world)
        if self.world.is_main:
            kept = read_json(self.folder.samples) or {}
            write_atomically(
                self.folder.samples, json.dumps({**kept, when: found}, indent=1, ensure_ascii=False)
            )
        return found

    def _export(self, weights: Mapping[str, Parts], source, trackers: track.Trackers) -> dict[str, Path]:
        config = self.config
        whole = self._whole(source)
        exports: dict[str, Path] = {}
        for what in config.checkpoint.export:
            target = self.folder.export(what)
            trackers.note(f"writing {target}")
            if what == "adapter":
                base = str(source.path.resolve())
                checkpoint.export_peft(weights, whole, target, method=config.method, base_path=base)
            else:
                checkpoint.export_hf(
                    weights, whole, target, source=source, merge=what == "merged", dtype=self.dtype
                )
            self._export_template(target)
            exports[what] = target
        return exports

    def _export_template(self, target: Path) -> None:
        """The template that the model was trained with goes along, where it is not the tokenizer's own."""
        template = self.config.data.chat_template
        if template and self.world.is_main:
            write_atomically(target / "chat_template.jinja", Path(template).read_text("utf-8"))

    def _finish(self, result: TrainResult, total_steps: int, before, after, trackers: track.Trackers) -> None:
        trackers.plot(self.folder.loss_plot)
        summary = {
            "finished": not result.stopped,
            "goal": goal(self.config),
            "step": result.step,
            "total_steps": total_steps,
            "loss": result.loss,
            "eval_before": result.eval_before,
            "eval_after": result.eval_after,
            "exports": {k: str(v) for k, v in result.exports.items()},
            "free_gib": shutil.disk_usage(self.folder.path).free // 2**30,
        }
        write_atomically(self.folder.summary, json.dumps(summary, indent=1))
        trackers.finish(summary, before, after)


def _most_kept(config: CheckpointConfig, total_steps: int) -> int:
    """How many checkpoints there are at most at one time."""
    if not config.every:
        return 1
    multiples = total_steps // math.lcm(config.every, config.keep_every) if config.keep_every else 0
    return min(config.keep_last + config.keep_best + multiples, total_steps // config.every + 1) + 1
