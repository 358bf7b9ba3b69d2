"""Learning rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from megatune.config.schema import OptimConfig


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """`warmup` below 1 is a share of all steps (at least one step where it is above 0), from 1 on a number of steps."""
    if config.warmup < 1:
        return math.ceil(config.warmup * total_steps)
    return int(config.warmup)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up that reaches the peak at its last step, then: cosine (SGDR's half cosine, arXiv:1608.03983), linear,
    constant, or wsd (warm-up, stable, linear decay over the last `decay` share, arXiv:2404.06395); all but constant
    fall towards lr * min_lr_ratio, which the step after the last would have.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, round(config.decay * total_steps))
        start = max(warmup, total_steps - decay)
        progress = max(0.0, (step - start) / max(1, total_steps - start))
        return config.lr * (1 - (1 - floor) * min(1.0, progress))
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (floor + (1 - floor) * shape)
