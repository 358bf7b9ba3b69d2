"""Which layers each pipeline stage has, which stages each rank, and whether a schedule can be as the options say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError
from megatune.parallel.stages import Stage, cut

_ONE_STAGE = ("gpipe", "1f1b", "zb-h1")
_ZERO_BUBBLE = ("zb-h1", "zbv")


def virtual_of(config: ParallelConfig) -> int:
    """Stages that one pipeline rank holds."""
    if config.pipeline == 1:
        return 1
    return config.virtual or (1 if config.schedule in _ONE_STAGE else 2)


def check_schedule(config: ParallelConfig) -> None:
    """Raises ParallelError, with what to change, for a schedule that cannot be and for options that do nothing."""
    schedule, virtual = config.schedule, config.virtual
    if config.pipeline == 1:
        given = {
            "parallel.schedule": schedule if schedule != "1f1b" else None,
            "parallel.virtual": virtual if virtual != 1 else None,
            "parallel.stages": config.stages,
        }
        for key, value in given.items():
            if value is not None:
                raise ParallelError(
                    f"{key}: {value} does nothing without a pipeline; set parallel.pipeline to 2 or more, or leave it "
                    "out"
                )
        return
    if schedule in _ONE_STAGE and virtual not in (None, 1):
        raise ParallelError(
            f"parallel.virtual: with schedule {schedule} each rank holds 1 stage, not {virtual}; use 1, or schedule "
            "interleaved"
        )
    if schedule == "zbv" and virtual not in (None, 2):
        raise ParallelError(
            f"parallel.virtual: with schedule zbv each rank holds 2 stages, not {virtual}; use 2"
        )
    if schedule == "interleaved" and virtual == 1:
        raise ParallelError(
            "parallel.virtual: with schedule interleaved each rank holds 2 stages or more, not 1; use 2, or schedule "
            "1f1b"
        )
    if schedule in _ZERO_BUBBLE and config.zero == 3:
        raise ParallelError(
            f"parallel.schedule: {schedule} computes weight gradients when ZeRO stage 3 has given the weights away "
            "again; set parallel.zero to 2 or less, or use schedule 1f1b or interleaved"
        )


def check_micro_batches(config: ParallelConfig, micro_batches: int, sequences: int) -> None:
    """Whether the schedule works with that many micro-batches a step, of `sequences` sequences each over all data
    parallel processes. All but interleaved work with any number. Raises ParallelError with the global batch sizes that
    are possible."""
    pp = config.pipeline
    if config.schedule == "interleaved" and pp > 1 and micro_batches % pp:
        below = micro_batches // pp * pp
        choices = " or ".join(str(n * sequences) for n in (below, below + pp) if n)
        raise ParallelError(
            f"train.global_batch_size: {micro_batches * sequences} sequences are {micro_batches} micro-batches of "
            f"{sequences}, but schedule interleaved needs a multiple of parallel.pipeline: {pp} micro-batches; use "
            f"{choices}"
        )


def stages_of(
    config: ParallelConfig, layer_costs: Sequence[float], first_cost: float, last_cost: float
) -> tuple[Stage, ...]:
    """All stages of a model whose layers, embedding and head have these costs (in any unit).

    `config.stages` is taken as it is. Raises ParallelError as `check_schedule`, and where it does not fit the model.
    """
    check_schedule(config)
    virtual = virtual_of(config)
    count = config.pipeline * virtual
    if config.stages is None and count > len(layer_costs):
        layers = len(layer_costs)
        lower = [
            f"{key} to {most}"
            for key, most, least in (
                ("parallel.pipeline", layers // virtual, 2),
                ("parallel.virtual", layers // config.pipeline, 2),
            )
            if most >= least
        ]
        raise ParallelError(
            f"parallel.pipeline: {config.pipeline} x virtual {virtual} are {count} stages, more than the model's "
            f"{layers} layers; {'lower ' + ' or '.join(lower) + ', or ' if lower else ''}name empty stages in "
            "parallel.stages"
        )
    if config.stages is None:
        return cut(balance(layer_costs, first_cost, last_cost, count))
    if len(config.stages) != count:
        raise ParallelError(
            f"parallel.stages: has {len(config.stages)} entries, but pipeline {config.pipeline} x virtual {virtual} "
            f"are {count} stages; give {count}"
        )
    if sum(config.stages) != len(layer_costs):
        raise ParallelError(
            f"parallel.stages: the entries add up to {sum(config.stages)} layers, but the model has "
            f"{len(layer_costs)}; make them add up to {len(layer_costs)}"
        )
    return cut(config.stages)


def balance(layer_costs: Sequence[float], first_cost: float, last_cost: float, stages: int) -> list[int]:
    """Layers of each stage, so that the dearest stage is as cheap as can be and, of these ways, the squares of the
    stages' costs add up to the least.

    `first_cost` and `last_cost` (embedding, head) are the first and the last stage's. Every stage has a layer where
    there are enough.
    """
    return list(_balance(tuple(layer_costs), first_cost, last_cost, stages))


@lru_cache(maxsize=64)
def _balance(
    layer_costs: tuple[float, ...], first_cost: float, last_cost: float, stages: int
) -> tuple[int, ...]:
    before = list(accumulate(layer_costs, initial=0.0))
    least = 1 if len(layer_costs) >= stages else 0

    def cost(stage: int, start: int, stop: int) -> float:
        ends = (first_cost if stage == 0 else 0.0) + (last_cost if stage == stages - 1 else 0.0)
        return before[stop] - before[start] + ends

    def best(limit: float, squares: bool) -> tuple[float, tuple[int, ...]]:
        """The cheapest way with no stage above `limit`: by the sum of squares, or by the dearest stage."""
        # Of the first s stages with the first n layers: (measure, where stage s - 1 starts).
        table: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for stage in range(stages):
            row: dict[int, tuple[float, int]] = {}
            room = len(layer_costs) - least * (stages - 1 - stage)
            for start, (so_far, _) in table[-1].items():
                for stop in range(start + least, room + 1):
                    own = cost(stage, start, stop)
                    if own > limit:
                        break
                    measure = so_far + own * own if squares else max(so_far, own)
                    if stop not in row or measure < row[stop][0]:
                        row[stop] = measure, start
            table.append(row)
        stop, counts = len(layer_costs), []
        for row in reversed(table[1:]):
            start = row[stop][1]
            counts.append(stop - start)
            stop = start
        return table[-1][len(layer_costs)][0], tuple(reversed(counts))

    dearest, _ = best(math.inf, squares=False)
    # Sums in another order may differ in the last bits.
    return best(dearest * (1 + 1e-9), squares=True)[1]
