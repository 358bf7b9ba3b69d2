"""Pipeline parallelism: stages of layers on different ranks, and the schedules that keep them busy."""

from megatune.parallel.pipeline.engine import Pipeline
from megatune.parallel.pipeline.partition import (
    balance,
    check_micro_batches,
    check_schedule,
    stages_of,
    virtual_of,
)
from megatune.parallel.pipeline.schedules import Action, Timeline, held, play, schedule

__all__ = [
    "Action",
    "Pipeline",
    "Timeline",
    "balance",
    "check_micro_batches",
    "check_schedule",
    "held",
    "play",
    "schedule",
    "stages_of",
    "virtual_of",
]
