"""Training: the loop and what it is wired from.

The room is not called `train` because `megatune.train` is the public function.
"""

from megatune.training.run import STOPPED_EXIT_CODE, TrainResult, train
from megatune.training.step import StepResult, Trainer, evaluate

__all__ = ["STOPPED_EXIT_CODE", "StepResult", "TrainResult", "Trainer", "evaluate", "train"]
