"""A run as a batch script: directives, values, and the code that is the same in every job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatune.config.schema import Config
from megatune.errors import ConfigError
from megatune.launch.slurm.directives import directives
from megatune.launch.slurm.grace import grace_seconds
from megatune.launch.slurm.quoting import bash_word

CODE = Path(__file__).with_name("job.sh")
VALUES_BEGIN = b"# --- values: words, never code "
VALUES_END = b"# --- code "


@dataclass(frozen=True)
class Job:
    """What is submitted. `script`: its bytes; `folder`: the run's, absolute; `workdir`: where the job runs."""

    script: bytes
    name: str
    folder: Path
    workdir: Path


def render(config: Config, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Job:
    """The batch script that runs `megatune train PATH OVERRIDES` as `config.slurm` says.

    `config`: what `load_config(path, overrides)` gave. The same arguments, in the same working directory and with the
    same measured save time, give the same bytes. Raises ConfigError for values that cannot be passed on.
    """
    workdir = Path.cwd()
    folder = Path(os.path.abspath(config.checkpoint.folder))
    name = config.slurm.job_name or _default_name(folder)
    lines = directives(config, str(folder), str(workdir), name, grace_seconds(config, folder))
    values = _values(config, os.path.abspath(path), overrides, workdir, folder)
    parts = [
        b"#!/bin/bash",
        b"# Made by `megatune slurm render`: change the configuration rather than this.",
        *lines,
        b"",
        VALUES_BEGIN + b"-" * 60,
        *(line.encode("ascii") for line in values),
        b"",
        VALUES_END + b"-" * 60,
        CODE.read_bytes(),
    ]
    return Job(b"\n".join(parts), name, folder, workdir)


def _default_name(folder: Path) -> str:
    return "megatune-" + "".join(c if c.isprintable() else "_" for c in folder.name)


def _values(config: Config, path: str, overrides: Sequence[str], workdir: Path, folder: Path) -> list[str]:
    slurm = config.slurm
    container = slurm.container
    processes, cpu_processes = _processes(config)
    python = slurm.python or ("python" if container else sys.executable)
    environment = [f"{name}={_plain(value)}" for name, value in slurm.env.items()]
    return [
        _assign("config", path, "the configuration's path"),
        _assign_all("overrides", overrides, "an override"),
        _assign("workdir", str(workdir), "the working directory"),
        _assign("folder", str(folder), "checkpoint.folder"),
        _assign("python", python, "slurm.python"),
        _assign("setup", "" if slurm.setup is None else os.path.abspath(slurm.setup), "slurm.setup"),
        _assign_all("environment", environment, "slurm.env"),
        _assign("processes", processes, "launch.nproc"),
        _assign("cpu_processes", cpu_processes, "launch.cpu_nproc"),
        _assign("requeue", str(slurm.requeue).lower(), "slurm.requeue"),
        _assign("retries", str(slurm.retries), "slurm.retries"),
        _assign("exclude_after", str(slurm.exclude_after), "slurm.exclude_after"),
        _assign("fewest_nodes", str(slurm.min_nodes or slurm.nodes), "slurm.min_nodes"),
        _assign("chain", str(slurm.chain), "slurm.chain"),
        _assign_all("srun_options", slurm.srun_options, "slurm.srun_options"),
        _assign("container", container.runtime if container else "", "slurm.container.runtime"),
        _assign("image", container.image if container else "", "slurm.container.image"),
        _assign_all("mounts", _mounts(config, path, workdir, folder), "slurm.container.mounts"),
        _assign_all("container_options", container.options if container else [], "slurm.container.options"),
    ]


def _assign(name: str, value: str, key: str) -> str:
    return f"{name}={bash_word(value, key)}"


def _assign_all(name: str, values: Sequence[str], key: str) -> str:
    return f"{name}=({' '.join(bash_word(value, key) for value in values)})"


def _plain(value: str | int | float) -> str:
    return value if isinstance(value, str) else repr(value)


def _processes(config: Config) -> tuple[str, str]:
    """Processes of each node (`auto`: as many as Slurm gives it GPUs), and how many where it gives none."""
    if config.launch.nproc != "auto":
        return str(config.launch.nproc), str(config.launch.cpu_nproc)
    return "auto", str(config.launch.cpu_nproc)


def _mounts(config: Config, path: str, workdir: Path, folder: Path) -> list[str]:
    """`SOURCE:TARGET` words for a container: what the job itself needs, and what the configuration adds."""
    container = config.slurm.container
    if container is None:
        return []
    own = dict.fromkeys((str(workdir), str(folder), os.path.dirname(path)))
    for place in own:
        if ":" in place or "," in place:
            raise ConfigError(
                f"slurm.container: {place} must be mounted, but holds a colon or a comma; rename it"
            )
    for mount in container.mounts:
        if "," in mount or not 1 <= len(mount.split(":")) <= 3 or not mount.split(":")[0]:
            raise ConfigError(
                f"slurm.container.mounts: {mount!r} is not SOURCE[:TARGET[:OPTIONS]] without commas"
            )
    added = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    return [*(f"{place}:{place}" for place in own), *added]


def values_section(script: bytes) -> bytes:
    """The assignments of a script, for checking what they mean to bash."""
    begin = script.index(VALUES_BEGIN)
    return script[begin : script.index(VALUES_END, begin)]
