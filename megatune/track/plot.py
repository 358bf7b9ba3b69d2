"""loss.png: what a run did, at a glance."""

from __future__ import annotations

import os
from pathlib import Path

from megatune.track.metrics import read_metrics


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average without the bias towards the start: `weight` is that of the past."""
    total = count = 0.0
    found = []
    for value in values:
        total = weight * total + (1 - weight) * value
        count = weight * count + (1 - weight)
        found.append(total / count)
    return found


def loss_plot(metrics: Path, target: Path) -> None:
    """Draw training loss (raw and smoothed) and evaluation loss of a metrics.jsonl into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training loss")
        # The window grows with the run: about a twentieth of it.
        weight = 1 - 1 / max(1.0, len(losses) / 20)
        axes.plot(steps, smooth(list(losses), weight), color="tab:blue", linewidth=1.8, label="smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, target)
