"""Whether a model and a batch fit a layout: every refusal is one sentence with the number to change."""

from __future__ import annotations

import torch

from megatune.config.layout import Layout, check_batch, layout_of
from megatune.config.schema import Config
from megatune.errors import ConfigError, ParallelError
from megatune.models.fp8 import check_fp8
from megatune.models.layout import check_tensor, stage_costs
from megatune.models.spec import DecoderSpec
from megatune.parallel.context import check_context
from megatune.parallel.pipeline import check_micro_batches, check_schedule, held, stages_of
from megatune.parallel.stages import Stage
from megatune.training.precision import check_masters


def check(config: Config, spec: DecoderSpec, world_size: int) -> Layout:
    """The layout of `world_size` processes. Raises ParallelError where they, the model or the batch cannot take it,
    ConfigError for an option that does nothing under it."""
    parallel = config.parallel
    layout = layout_of(parallel, world_size)
    check_options(config, layout)
    check_tensor(spec, layout.tp)
    check_context(spec.num_heads, spec.num_kv_heads, layout.tp, layout.cp, parallel.context_method)
    _check_experts(config, spec, layout)
    if config.model.fp8:
        check_fp8(spec, config.model.fp8)
    every = parallel.recompute
    if isinstance(every, int) and every > len(spec.layers):
        raise ConfigError(
            f"parallel.recompute: {every} is every {every}th layer, and the model has {len(spec.layers)}; use at most "
            f"{len(spec.layers)}, or none"
        )
    stages_of(parallel, *stage_costs(spec, config.data.seq_length))
    share = check_batch(config, layout)
    check_micro_batches(parallel, config.train.global_batch_size // share, share)
    return layout


def check_options(config: Config, layout: Layout) -> None:
    """Options of the layout that need no model to be judged."""
    parallel = config.parallel
    check_schedule(parallel)
    if parallel.context_method == "ulysses" and layout.cp == 1:
        raise ConfigError(
            "parallel.context_method: ulysses does nothing without context parallelism; set parallel.context above 1, "
            "or leave it out"
        )
    if parallel.replicate > 1 and parallel.zero == 0 and layout.ep == 1:
        raise ConfigError(
            f"parallel.replicate: {parallel.replicate} does nothing with zero: 0, where every process has all of its "
            "share; set parallel.zero to 1, 2 or 3, or leave replicate out"
        )
    if parallel.offload_optimizer and parallel.zero == 3:
        raise ConfigError(
            "parallel.offload_optimizer: true needs masters of its own, and with zero: 3 the sharded weights are the "
            "masters; set parallel.zero to 1 or 2, or leave offload_optimizer out"
        )
    if parallel.offload_optimizer and config.optim.name == "muon":
        raise ConfigError(
            "parallel.offload_optimizer: true does not go with optim.name: muon, whose products the CPU is too slow "
            "for; use optim.name: adamw, or leave offload_optimizer out"
        )
    _check_low_masters(config)
    cut = {"tensor": layout.tp, "pipeline": layout.pp, "context": layout.cp, "expert": layout.ep}
    for key, size in cut.items():
        if config.train.compile and size > 1:
            raise ConfigError(
                f"train.compile: true is not proven with parallel.{key}: {size}; set train.compile to false, or "
                f"parallel.{key} to 1"
            )
    _check_fp8(config, layout)
    if parallel.expert_tensor is not None and layout.tp == 1:
        raise ConfigError(
            "parallel.expert_tensor does nothing without tensor parallelism; set parallel.tensor above 1, or leave it "
            "out"
        )


def _check_low_masters(config: Config) -> None:
    """What an optimizer of bf16 weights goes with."""
    if config.optim.name != "adamw_bf16":
        return
    what = "optim.name: adamw_bf16"
    if config.model.dtype == "fp32":
        check_masters(config, torch.float32)
    if config.parallel.offload_optimizer:
        raise ConfigError(
            f"{what} keeps no masters that parallel.offload_optimizer: true could move; leave that out, or use "
            "optim.name: adamw"
        )
    if config.method.type == "lora":
        raise ConfigError(f"{what} does nothing for adapters, which are small and stay in fp32; use adamw")


def _check_fp8(config: Config, layout: Layout) -> None:
    """What linear layers in fp8 go with."""
    what = f"model.fp8: {config.model.fp8}"
    if not config.model.fp8:
        return
    if config.method.type != "full":
        raise ConfigError(f"{what} is for method full; leave it out with method.type: {config.method.type}")
    if layout.tp > 1:
        raise ConfigError(
            f"{what} does not go with parallel.tensor: {layout.tp}; set that to 1, or leave fp8 out"
        )
    parallel = config.parallel
    if parallel.schedule in ("zb-h1", "zbv"):
        raise ConfigError(
            f"{what} does not go with parallel.schedule: {parallel.schedule}; use 1f1b, or leave fp8 out"
        )
    if parallel.offload:
        raise ConfigError(
            f"{what} is not proven with parallel.offload: true; set that to false, or leave fp8 out"
        )
    if config.train.compile:
        raise ConfigError(
            f"{what} is not proven with train.compile: true; set that to false, or leave fp8 out"
        )


def _check_experts(config: Config, spec: DecoderSpec, layout: Layout) -> None:
    if spec.moe is not None and config.model.quantise:
        raise ConfigError(
            f"model.quantise: {config.model.quantise} is for models without experts, and this one has "
            f"{spec.moe.num_experts}; leave it out"
        )
    if spec.moe is None:
        if layout.ep > 1 or config.parallel.expert_tensor is not None:
            raise ConfigError(
                "parallel.expert is for mixture-of-experts models, and this one has no experts; leave it out"
            )
        for key, value in config.moe:
            if value:
                raise ConfigError(
                    f"moe.{key} is for mixture-of-experts models, and this one has none; leave it out"
                )
        return
    if spec.moe.num_experts % layout.ep:
        legal = [n for n in range(1, spec.moe.num_experts + 1) if spec.moe.num_experts % n == 0]
        raise ParallelError(
            f"parallel.expert: {layout.ep} does not divide the model's {spec.moe.num_experts} experts; use one of "
            f"{', '.join(map(str, legal))}"
        )
    if spec.moe.expert_size % layout.etp:
        raise ParallelError(
            f"parallel.expert_tensor: {layout.etp} does not divide an expert's inner size {spec.moe.expert_size}; "
            f"use 1"
        )
    if config.moe.bias_rate and not spec.moe.correction:
        raise ConfigError(
            "moe.bias_rate: this model's router has no balancing bias; use moe.aux_loss, or leave it out"
        )


def describe(config: Config, spec: DecoderSpec, layout: Layout, device: str) -> str:
    """The layout as a small table: a line for each dimension that has more than one process, saying what it cuts and
    which ranks rank 0's line is, and one for each pipeline rank, saying which layers it holds."""
    parallel = config.parallel
    stages = stages_of(parallel, *stage_costs(spec, config.data.seq_length))
    lines = [
        f"{layout.world_size} x {device}, {layout.describe()}, ZeRO {parallel.zero}, recompute {parallel.recompute}"
    ]
    what = {
        "tp": "heads, inner sizes and vocabulary; tokens between blocks",
        "cp": f"tokens of a sequence ({parallel.context_method})",
        "fsdp": "optimizer states" + (", gradients" if parallel.zero > 1 else "")
        if parallel.zero
        else "data",
        "dp_replicate": "data; copies of everything else",
        "ep": f"{spec.moe.num_experts} experts" if spec.moe else "",
        "etp": "inner sizes of experts",
    }
    if parallel.zero == 3:
        what["fsdp"] += " and parameters"
    per = len(stages) // layout.pp
    block = layout.world_size // layout.pp
    if layout.pp > 1:
        for rank in range(layout.pp):
            numbers = held(parallel.schedule, layout.pp, rank, per)
            parts = ", ".join(_layers(stages[number]) for number in numbers)
            ranks = f"ranks {rank * block}-{(rank + 1) * block - 1}"
            lines.append(f"pp {rank} of {layout.pp} ({parallel.schedule}): {ranks}: {parts}")
    for name, stride in strides(layout).items():
        size = layout.sizes()[name]
        if size > 1 and not (name == "etp" and layout.ep == 1 and layout.etp == layout.tp):
            ranks = [str(place * stride) for place in range(min(size, 4))]
            if size > 4:
                ranks.append(f".. {(size - 1) * stride}")
            lines.append(f"{name} {size}: ranks {' '.join(ranks)}: {what[name]}")
    return "\n".join(lines)


def strides(layout: Layout) -> dict[str, int]:
    """Distance of neighbouring ranks along each dimension."""
    inner = layout.tp * layout.fsdp
    found = {"tp": 1, "cp": layout.tp, "fsdp": layout.tp, "dp_replicate": inner}
    return found | ({"ep": layout.etp, "etp": 1} if layout.ep > 1 else {})


def _layers(stage: Stage) -> str:
    """The layers of a stage for people: embedding, 0-15."""
    first, last = stage.layers.start, stage.layers.stop - 1
    names = [f"layers {first}-{last}" if last > first else f"layer {first}"] if stage.layers else []
    return " + ".join((["embedding"] if stage.is_first else []) + names + (["head"] if stage.is_last else []))
