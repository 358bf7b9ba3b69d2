"""The `#SBATCH` lines of a job: which options of sbatch it gets, and which it must not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatune.config.schema import Config, SlurmConfig
from megatune.errors import ConfigError
from megatune.launch.slurm.quoting import directive_word, file_pattern

# Options of sbatch that have a key of their own, or that the job's script relies on: option -> what to do instead.
_OURS = {
    "job-name": "use slurm.job_name",
    "nodes": "use slurm.nodes and slurm.min_nodes",
    "gpus-per-node": "use slurm.gpus",
    "cpus-per-task": "use slurm.cpus",
    "mem": "use slurm.memory",
    "time": "use slurm.time",
    "partition": "use slurm.partition",
    "account": "use slurm.account",
    "qos": "use slurm.qos",
    "constraint": "use slurm.constraint",
    "reservation": "use slurm.reservation",
    "nodelist": "use slurm.nodelist",
    "exclude": "use slurm.exclude",
    "exclusive": "use slurm.exclusive",
    "mail-user": "use slurm.mail_user",
    "mail-type": "use slurm.mail_type",
    "signal": "use slurm.grace",
    "requeue": "use slurm.requeue",
    "no-requeue": "use slurm.requeue",
    "dependency": "use slurm.chain, or submit with `megatune slurm submit --after JOB`",
    "ntasks": "the job has one task a node",
    "ntasks-per-node": "the job has one task a node",
    "array": "an array would train into one folder many times",
    "output": "the output goes to slurm/ in checkpoint.folder",
    "error": "the output goes to slurm/ in checkpoint.folder",
    "open-mode": "output is always appended",
    "chdir": "the job runs where it was submitted",
    "wrap": "it would replace the job's script",
    "parsable": "it changes what sbatch prints",
    "test-only": "use `megatune slurm doctor`",
    "wait": "use `megatune slurm logs --follow`",
}
# Full names of options that are the beginning of one of those above.
_NOT_SHORTENED = {"mem", "time", "nodes", "ntasks"}
_OPTION = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


def directives(config: Config, folder: str, workdir: str, job_name: str, grace: int) -> list[bytes]:
    """The job's `#SBATCH` lines, without line ends.

    `folder`: the run's, absolute; `workdir`: where the job runs; `grace`: seconds between the notice and the limit.
    Raises ConfigError for options that are not ours to pass on, and for values that a line cannot hold.
    """
    return [
        line
        for key, name, value in _options(config, folder, workdir, job_name, grace)
        for line in [_line(key, name, value)]
    ]


def _options(
    config: Config, folder: str, workdir: str, job_name: str, grace: int
) -> Iterator[tuple[str, str, str | None]]:
    """(key of the configuration, option of sbatch, value or None for a flag)."""
    slurm = config.slurm
    nodes = str(slurm.nodes) if slurm.min_nodes is None else f"{slurm.min_nodes}-{slurm.nodes}"
    yield "slurm.job_name", "job-name", job_name
    yield "slurm.nodes", "nodes", nodes
    if (
        slurm.min_nodes is None
    ):  # with a range of nodes it would make Slurm take as few as it may, even where all are free
        yield "slurm.nodes", "ntasks-per-node", "1"
    for key, option in (
        ("gpus", "gpus-per-node"),
        ("cpus", "cpus-per-task"),
        ("memory", "mem"),
        ("time", "time"),
        ("partition", "partition"),
        ("account", "account"),
        ("qos", "qos"),
        ("constraint", "constraint"),
        ("reservation", "reservation"),
        ("nodelist", "nodelist"),
        ("exclude", "exclude"),
        ("mail_user", "mail-user"),
        ("mail_type", "mail-type"),
    ):
        value = getattr(slurm, key)
        if value not in (None, []):
            yield f"slurm.{key}", option, _text(value)
    if slurm.exclusive:
        yield "slurm.exclusive", "exclusive", None
    yield "slurm.grace", "signal", f"B:USR1@{grace}"
    yield "slurm.requeue", "requeue" if slurm.requeue else "no-requeue", None
    yield "the working directory", "chdir", workdir
    yield "checkpoint.folder", "output", file_pattern(f"{folder}/slurm", "checkpoint.folder") + "/%j.out"
    yield "slurm", "open-mode", "append"
    yield from _passed_on(slurm)


def _passed_on(slurm: SlurmConfig) -> Iterator[tuple[str, str, str | None]]:
    for name, value in slurm.options.items():
        key, option = f"slurm.options.{name}", name.replace("_", "-")
        if not _OPTION.fullmatch(option) or len(option) < 2:
            raise ConfigError(
                f"{key}: is not the long name of an option of sbatch (small letters, digits, dashes)"
            )
        _check_is_not_ours(key, option)
        if value is None or value is False:
            continue
        yield key, option, None if value is True else _text(value)


def _check_is_not_ours(key: str, option: str) -> None:
    for ours, instead in _OURS.items():
        if option == ours:
            raise ConfigError(f"{key}: --{ours} cannot be passed on: {instead}")
        # sbatch takes every unique beginning of a name for the name.
        if ours.startswith(option) and option not in _NOT_SHORTENED:
            raise ConfigError(
                f"{key}: sbatch would read --{option} as --{ours}; write the option's whole name"
            )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(item) for item in value)
    return str(value)


def _line(key: str, option: str, value: str | None) -> bytes:
    start = b"#SBATCH --" + option.encode("ascii")
    return start if value is None else start + b"=" + directive_word(value, key)
