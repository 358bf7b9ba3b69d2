"""The layout: how many processes each dimension has, from the configuration and the number of processes alone.

Needs no torch, so that it is checked before any process starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatune.config.schema import Config, ParallelConfig
from megatune.errors import ParallelError


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions. Ranks are numbered with `pp` outermost, then dp_replicate, dp_shard, cp, tp innermost.

    The expert parameters' view of the dp_shard x cp x tp processes: `efsdp` x `ep` x `etp`, etp innermost.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def fsdp(self) -> int:
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        return self.dp_shard * self.cp * self.tp // (self.ep * self.etp)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    def sizes(self) -> dict[str, int]:
        """All axes by name, the derived ones too."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp", "fsdp", "efsdp")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """As in tp2-pp2-dp2: dimensions above 1, or `1 process`."""
        dp = self.dp_replicate * self.dp_shard
        named = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": dp, "ep": self.ep}
        if self.etp != self.tp and self.ep > 1:
            named["etp"] = self.etp
        return "-".join(f"{name}{size}" for name, size in named.items() if size > 1) or "1 process"


def layout_of(config: ParallelConfig, world_size: int) -> Layout:
    """The layout of `world_size` processes. Raises ParallelError where they cannot take it."""
    model = config.tensor * config.pipeline * config.context
    if world_size % model:
        raise ParallelError(
            f"parallel: tensor {config.tensor} x pipeline {config.pipeline} x context {config.context} = {model} does "
            f"not divide the {world_size} processes of this run; start {_nearest(world_size, model)}, or lower one"
        )
    data = world_size // model
    if data % config.replicate:
        raise ParallelError(
            f"parallel.replicate: {config.replicate} does not divide the {data} data parallel processes of this run "
            f"({world_size} / {model}); use one of {_divisors(data)}"
        )
    shard = data // config.replicate
    etp = config.tensor if config.expert_tensor is None else config.expert_tensor
    if config.tensor == 1 and etp > 1:
        raise ParallelError(
            f"parallel.expert_tensor: {etp} does nothing without tensor parallelism; set parallel.tensor above 1, or "
            "leave it out"
        )
    if config.tensor % etp:
        raise ParallelError(
            f"parallel.expert_tensor: {etp} does not divide parallel.tensor: {config.tensor}; use one of "
            f"{_divisors(config.tensor)}"
        )
    room = shard * config.context * config.tensor // etp
    if room % config.expert:
        raise ParallelError(
            f"parallel.expert: {config.expert} does not divide the {room} processes it is taken from (dp_shard {shard} "
            f"x context {config.context} x tensor / expert_tensor {config.tensor // etp}); use one of {_divisors(room)}"
        )
    return Layout(config.pipeline, config.replicate, shard, config.context, config.tensor, config.expert, etp)


def check_batch(config: Config, layout: Layout) -> int:
    """Sequences that one micro-batch on each data parallel process takes together. Raises ParallelError where the
    global batch is no multiple of it."""
    train = config.train
    copies = layout.dp_replicate * layout.dp_shard
    share = copies * train.micro_batch_size
    if train.global_batch_size % share:
        below = train.global_batch_size // share * share
        choices = ", ".join(str(n) for n in (below, below + share) if n)
        raise ParallelError(
            f"train.global_batch_size: {train.global_batch_size} sequences do not split over {copies} data parallel "
            f"processes with micro-batches of {train.micro_batch_size}; use {choices}"
        )
    return share


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _nearest(world_size: int, model: int) -> str:
    below = world_size // model * model
    return " or ".join(str(n) for n in (below, below + model) if n)
