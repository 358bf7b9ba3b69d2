"""Where the numbers of a run go: console, metrics.jsonl, logs, TensorBoard, W&B, SwanLab, MLflow."""

from megatune.track.trackers import Tracker, Trackers, build

__all__ = ["Tracker", "Trackers", "build"]
