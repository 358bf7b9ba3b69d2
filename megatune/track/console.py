"""What a person sees: a header, a live line, and what came out of it. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from megatune import __version__


class Console:
    """Rank 0's terminal. On a terminal a progress line that is redrawn with each `log`; else a line for each."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        self._rich = rich or RichConsole(highlight=False, soft_wrap=False)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._resumed = 0
        self._first: tuple[int, float] | None = None

    def header(self, facts: dict[str, str]) -> None:
        """Print what will run: model, layout, memory, op bodies, data."""
        if not self._rich.is_terminal:
            width = max(map(len, facts), default=0)
            for name, value in facts.items():
                self._print(f"{name:<{width}}  {value}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        for name, value in facts.items():
            table.add_row(Text(name), Text(value))
        self._rich.print(Panel(table, title=f"megatune {__version__}", title_align="left", box=box.ROUNDED))

    def note(self, text: str) -> None:
        """Print one line (above the progress line)."""
        self._print(text)

    def begin(self, total_steps: int, resumed_step: int) -> None:
        """The steps are about to start."""
        self._total, self._resumed, self._first = total_steps, resumed_step, None

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Show an evaluation as a line of its own, anything else as the state of the run."""
        if "eval_loss" in metrics:
            self._print(f"step {step}: held-out loss {_number(metrics['eval_loss'], '.4f')}")
            return
        if self._first is None:
            self._first = (step, time.monotonic())
        text = self._state(step, metrics)
        if not self._rich.is_terminal:
            self._print(f"step {step}/{self._total}  {text}")
            return
        if self._live is None:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(24),
                "{task.fields[state]}",
            )
            # No refresh thread: it would take time from a training process for nothing new to show.
            self._live = Progress(*columns, console=self._rich, auto_refresh=False)
            self._live.start()
            self._task = self._live.add_task("", total=self._total, state="")
        self._live.update(self._task, completed=step, state=text, refresh=True)

    def stop(self) -> None:
        """End the progress line; the cursor is back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(
        self, summary: dict[str, Any], before: list[dict[str, str]], after: list[dict[str, str]]
    ) -> None:
        """Print what came out and what to do next."""
        self.stop()
        if not summary["finished"]:
            self._print(
                f"stopped at step {summary['step']} of {summary['total_steps']}; a checkpoint is saved, the same "
                f"command goes on from it"
            )
            return
        for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
            self._sample(number, old, new)
        self._print(f"done: {summary['step']} steps, last training loss {_number(summary['loss'], '.4f')}")
        first, last = summary.get("eval_before"), summary.get("eval_after")
        if first is not None and last is not None:
            self._print(
                f"held-out loss: {first:.4f} before, {last:.4f} after ({(last - first) / first:+.1%})"
            )
        exports = summary.get("exports") or {}
        for what, path in exports.items():
            self._print(f"{what}: {path}")
        usable = exports.get("merged") or exports.get("model") or exports.get("adapter")
        if usable:
            self._print(f"next: megatune chat {usable}")

    def _sample(self, number: int, old: dict[str, str], new: dict[str, str]) -> None:
        table = Table("before", "after", title=f"answer {number}", box=box.SIMPLE_HEAD, expand=True)
        table.add_row(Text(old["answer"].strip()), Text(new["answer"].strip()))
        self._print(f"prompt {number}: {_short(new['prompt'])}")
        if new.get("reference"):
            self._print(f"reference {number}: {_short(new['reference'])}")
        self._rich.print(table)

    def _state(self, step: int, metrics: dict[str, float | None]) -> str:
        parts = [
            f"loss {_number(metrics.get('loss'), '.4f')}",
            f"{_number(metrics.get('tokens_per_second_per_gpu'), ',.0f')} tokens/s/GPU",
            f"MFU {_number(metrics.get('mfu'), '.1%')}",
            f"{_number(metrics.get('memory_gib'), '.2f')} GiB",
            f"ETA {self._eta(step, metrics)}",
        ]
        return "  ".join(parts)

    def _eta(self, step: int, metrics: dict[str, float | None]) -> str:
        """From the wall clock, evaluations and saves included; from the step's own time until there are two."""
        first_step, began = self._first
        if step > first_step:
            seconds = (time.monotonic() - began) / (step - first_step)
        elif metrics.get("step_seconds") is not None:
            seconds = metrics["step_seconds"]
        else:
            return "-"
        left = round(seconds * max(0, self._total - step))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _print(self, text: str) -> None:
        # Nothing in it is markup: prompts and paths may hold brackets.
        self._rich.print(text, markup=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
