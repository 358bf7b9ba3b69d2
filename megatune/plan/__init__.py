"""What a run will need, before it starts."""

from megatune.plan.estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]
