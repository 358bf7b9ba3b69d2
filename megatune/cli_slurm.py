"""`megatune slurm ...`: thin, as all verbs are. Everything heavy is imported inside a verb."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Verb = Callable[[Callable[..., int | None]], Callable[..., None]]


def add_verbs(commands: click.Group, verb: Verb) -> None:
    """Put the group `slurm` under `commands`; `verb` turns errors into messages and values into exit codes."""

    @commands.group()
    def slurm() -> None:
        """Run on a Slurm cluster; the section `slurm` of CONFIG says where and how large."""

    for function in (render, submit, status, logs, stop, requeue, doctor):
        command = verb(function)
        for parameter in reversed((_config_arguments, *_OPTIONS[function.__name__])):
            command = parameter(command)
        slurm.command(function.__name__)(command)


def _config_arguments(function: Callable[..., None]) -> Callable[..., None]:
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("config")(function)


def render(config: str, overrides: tuple[str, ...]) -> None:
    """Print the batch script that `submit` submits, byte for byte."""
    from megatune.config import load_config
    from megatune.launch.slurm.script import render as make

    job = make(load_config(config, overrides), config, overrides)
    sys.stdout.buffer.write(job.script)
    sys.stdout.buffer.flush()


def submit(config: str, overrides: tuple[str, ...], after: str | None) -> None:
    """Submit the run, or go on with it: it starts from its newest checkpoint."""
    from megatune.config import load_config
    from megatune.launch.slurm.submission import submit as send

    submission = send(load_config(config, overrides), config, overrides, after)
    jobs = submission.jobs
    click.echo(
        f"submitted {'jobs' if len(jobs) > 1 else 'job'} {', '.join(jobs)}; output: {submission.folder}/slurm"
    )
    click.echo(f"  megatune slurm logs --follow {config}")


def status(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the run's jobs, its step and loss, and its newest checkpoint."""
    import json

    from megatune.launch.slurm.status import lines
    from megatune.launch.slurm.status import status as ask

    settings, submission = _newest(config, overrides)
    found = ask(settings, submission)
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


def logs(
    config: str,
    overrides: tuple[str, ...],
    rank: tuple[int, ...],
    node: tuple[int, ...],
    follow: bool,
    lines: int,
) -> None:
    """Print the end of the job's output, or of the logs of ranks and nodes; with --follow what comes, over requeues
    and the jobs of a chain, until the last one has ended."""
    from megatune.launch.slurm import client
    from megatune.launch.slurm.logs import show

    _, submission = _newest(config, overrides)
    names: list[tuple[str | None, str]] = [(f"rank-{number:05d}.log", f"rank {number}") for number in rank]
    names += [(f"node-{number}.log", f"node {number}") for number in node]

    def is_over() -> bool:
        return not any(state.is_alive for state in client.states(submission.jobs).values())

    try:
        show(submission, names or [(None, "the job")], lines=lines, follow=follow, is_over=is_over)
    except KeyboardInterrupt:
        return


def stop(config: str, overrides: tuple[str, ...], now: bool) -> None:
    """Save and stop: the running job ends at the edge of a step, jobs that wait are cancelled, none is requeued."""
    from megatune.launch.slurm.submission import stop as end

    _, submission = _newest(config, overrides)
    for line in end(submission, now=now) or ["no job of this run waits or runs"]:
        click.echo(line)


def requeue(config: str, overrides: tuple[str, ...]) -> None:
    """Send the run's job back to the queue: a running one saves first, an ended one starts again."""
    from megatune.launch.slurm.submission import requeue as again

    _, submission = _newest(config, overrides)
    click.echo(again(submission))


def doctor(config: str, overrides: tuple[str, ...]) -> int:
    """Check from the login node whether the job can run, and Slurm would take it; ends with go or no go."""
    from megatune.config import load_config
    from megatune.launch.slurm.doctor import examine, report

    checks = examine(load_config(config, overrides), config, overrides)
    click.echo("\n".join(report(checks)))
    return 1 if any(check.is_bad for check in checks) else 0


_OPTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "render": (),
    "submit": (
        click.option(
            "--after", metavar="DEPENDENCY", help="Begin after other jobs, for example afterok:1234."
        ),
    ),
    "status": (click.option("--json", "as_json", is_flag=True, help="Print everything as JSON."),),
    "logs": (
        click.option(
            "--rank", multiple=True, type=click.IntRange(min=0), help="This rank's log; may be repeated."
        ),
        click.option("--node", multiple=True, type=click.IntRange(min=0), help="This node's agent's log."),
        click.option("--follow", "-f", is_flag=True, help="Go on printing what comes."),
        click.option("--lines", "-n", default=50, show_default=True, type=click.IntRange(min=0)),
    ),
    "stop": (click.option("--now", is_flag=True, help="Cancel the running job without a new checkpoint."),),
    "requeue": (),
    "doctor": (),
}


def _newest(config: str, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    import os

    from megatune.config import load_config
    from megatune.launch.slurm.submission import newest

    settings = load_config(config, overrides)
    return settings, newest(Path(os.path.abspath(settings.checkpoint.folder)))
