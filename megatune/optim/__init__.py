"""Optimizers over sharded states, and learning rate schedules."""

from megatune.optim.schedules import learning_rate, warmup_steps
from megatune.optim.sharded import ShardedAdamW, ShardedOptimizer, build

__all__ = ["ShardedAdamW", "ShardedOptimizer", "build", "learning_rate", "warmup_steps"]
