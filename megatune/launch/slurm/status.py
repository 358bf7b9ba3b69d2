"""Where a run stands: its jobs as Slurm sees them, its steps as its own files say."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatune.config.schema import Config
from megatune.launch.slurm import client
from megatune.launch.slurm.submission import Submission

_TAIL = 256 * 1024


@dataclass(frozen=True)
class Progress:
    """`steps`: the goal, where the configuration names one; `seconds_left`: at the pace of the last steps;
    `checkpoint`: the newest, `checkpoint_age` in seconds."""

    step: int
    steps: int | None
    loss: float | None
    eval_loss: float | None
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    finished: bool


def progress(config: Config, folder: Path) -> Progress:
    """Read from metrics.jsonl, checkpoints/ and summary.json; nothing there yet is no error."""
    rows = _last_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    step = int(steps[-1]["step"]) if steps else 0
    goal = config.train.steps
    paces = [row["step_seconds"] for row in steps[-20:] if isinstance(row.get("step_seconds"), int | float)]
    left = (goal - step) * sum(paces) / len(paces) if goal and paces else None
    saved = sorted(
        (folder / "checkpoints").glob("step-*/manifest.json"), key=lambda path: (len(path.parent.name), path)
    )
    newest = saved[-1] if saved else None
    age = max(0.0, time.time() - newest.stat().st_mtime) if newest else None
    summary = _object(folder / "summary.json")
    return Progress(
        step,
        goal,
        steps[-1]["loss"] if steps else None,
        evals[-1]["eval_loss"] if evals else None,
        left,
        newest.parent.name if newest else None,
        age,
        bool(summary.get("finished")) and (goal is None or summary.get("step") == goal or step <= goal),
    )


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, 2) - _TAIL)
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line may be half written
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def status(config: Config, submission: Submission) -> dict[str, Any]:
    """Everything as JSON-like data: `jobs` (in the chain's order), `marks`, and the run's progress."""
    states = client.states(submission.jobs)
    marks = [mark for mark in ("done", "failed", "stop", "requeue") if submission.marked(mark)]
    return {
        "folder": str(submission.folder),
        "jobs": [asdict(states[job]) for job in submission.jobs],
        "marks": marks,
        **asdict(progress(config, submission.folder)),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """`status` for a person."""
    shown = []
    for number, job in enumerate(found["jobs"], 1):
        chain = f" ({number} of {len(found['jobs'])})" if len(found["jobs"]) > 1 else ""
        parts = [f"job {job['job']}{chain}: {job['state']}"]
        parts += [job["nodes"]] if job["nodes"] else []
        parts += [f"{job['used']} used, {job['left']} left"] if job["left"] else []
        parts += [f"restarted {job['restarts']} times"] if job["restarts"] else []
        parts += [f"waits for: {job['reason']}"] if job["state"] == "PENDING" and job["reason"] else []
        shown.append(", ".join(parts))
    goal = f" of {found['steps']}" if found["steps"] else ""
    run = [f"step {found['step']}{goal}"]
    run += [f"loss {found['loss']:.4f}"] if found["loss"] is not None else []
    run += [f"held-out loss {found['eval_loss']:.4f}"] if found["eval_loss"] is not None else []
    if found["seconds_left"]:
        run.append(f"{_duration(found['seconds_left'])} left at the present pace")
    shown.append(", ".join(run))
    if found["checkpoint"]:
        shown.append(f"newest checkpoint: {found['checkpoint']}, {_duration(found['checkpoint_age'])} old")
    words = {
        "done": "the run is done",
        "failed": "given up: megatune slurm logs says why",
        "stop": "stopped as asked: megatune slurm submit goes on",
        "requeue": "goes back to the queue after its save",
    }
    return shown + [words[mark] for mark in found["marks"]]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
