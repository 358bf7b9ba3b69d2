"""Checks before a job is submitted: what the login node can know. Starts nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatune.config.schema import Config
from megatune.config.slurm import time_limit_seconds
from megatune.errors import MegatuneError
from megatune.launch.slurm import client
from megatune.launch.slurm.grace import grace_seconds, measured_need
from megatune.launch.slurm.script import Job, render
from megatune.launch.slurm.submission import given_options

# File systems that other nodes do not see.
_LOCAL = {"tmpfs", "ramfs", "overlay", "overlayfs", "ext2/ext3", "xfs", "btrfs", "zfs"}


@dataclass(frozen=True)
class Check:
    """`verdict`: ok, doubt (it may work) or bad (it will not). `text`: what was seen, and what to do about it."""

    name: str
    verdict: str
    text: str

    @property
    def is_bad(self) -> bool:
        return self.verdict == "bad"


def examine(config: Config, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[Check]:
    """All checks, in order; those that need Slurm end with the first that shows that there is none."""
    checks: list[Check] = []
    try:
        job = render(config, path, overrides)
    except MegatuneError as error:
        return [Check("script", "bad", str(error))]
    checks.append(Check("script", "ok", f"{len(job.script)} bytes, job name {job.name}"))
    for look in (_bash, _controller, _accepted, _requeue, _times, _folder, _python, _container, _setup):
        found = list(_guarded(look, config, job))
        checks += found
        if look is _controller and any(check.is_bad for check in found):
            break
    return checks


def _guarded(look: Callable[[Config, Job], Iterator[Check]], config: Config, job: Job) -> Iterator[Check]:
    try:
        yield from look(config, job)
    except (MegatuneError, OSError, subprocess.SubprocessError) as error:
        yield Check(look.__name__.strip("_"), "bad", str(error))


def report(checks: Sequence[Check]) -> list[str]:
    """Lines for a person; the last is the verdict."""
    signs = {"ok": "ok   ", "doubt": "doubt", "bad": "BAD  "}
    lines = [f"{signs[check.verdict]} {check.name}: {check.text}" for check in checks]
    bad = [check.name for check in checks if check.is_bad]
    return [*lines, f"no go: {', '.join(bad)}" if bad else "go"]


def _bash(_config: Config, job: Job) -> Iterator[Check]:
    done = subprocess.run(["bash", "-n"], input=job.script, capture_output=True, timeout=60, check=False)
    if done.returncode:
        yield Check("bash", "bad", done.stderr.decode("utf-8", "replace").strip())


def _controller(_config: Config, _job: Job) -> Iterator[Check]:
    version = client.call("sbatch", "--version").stdout.strip()
    ping = client.call("scontrol", "ping")
    if " UP" in ping.stdout:
        yield Check("controller", "ok", f"{version}, up")
    else:
        yield Check("controller", "bad", f"{version}, does not answer: {(ping.stdout + ping.stderr).strip()}")


def _accepted(config: Config, job: Job) -> Iterator[Check]:
    """Slurm's own opinion of partition, account, sizes and limits: sbatch --test-only queues nothing."""
    environ = client.submission_environment(given_options(config))
    with tempfile.NamedTemporaryFile(suffix=".sbatch") as script:
        script.write(job.script)
        script.flush()
        done = client.call("sbatch", "--test-only", script.name, environ=environ)
    said = re.sub(r"^sbatch: (error: )?", "", (done.stderr or done.stdout).strip().splitlines()[-1])
    yield Check("sbatch --test-only", "bad" if done.returncode else "ok", said)


def _requeue(config: Config, _job: Job) -> Iterator[Check]:
    shown = client.call("scontrol", "show", "config").stdout
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.M))
    if config.slurm.requeue and settings.get("JobRequeue") == "0":
        yield Check(
            "requeue",
            "doubt",
            "this cluster does not requeue by default (JobRequeue=0); slurm.chain may help",
        )
    elif config.slurm.requeue:
        yield Check("requeue", "ok", "JobRequeue=1")
    if settings.get("PreemptMode", "OFF").startswith("CANCEL"):
        yield Check(
            "preemption", "doubt", "preempted jobs are cancelled here, not requeued; slurm.chain goes on"
        )


def _times(config: Config, job: Job) -> Iterator[Check]:
    slurm = config.slurm
    grace, need = grace_seconds(config, job.folder), measured_need(job.folder)
    limit = None if slurm.time is None else time_limit_seconds(slurm.time)
    basis = "no save was measured yet" if need is None else f"the run needs {need:.0f} s to stop"
    if need is not None and grace < need:
        yield Check("grace", "bad", f"{grace} s, but {basis}; raise slurm.grace or slurm.time")
    elif limit is not None and grace + 120 > limit:
        yield Check("grace", "bad", f"a notice {grace} s before a limit of {limit} s leaves no time to train")
    else:
        yield Check("grace", "ok", f"notice {grace} s before the limit; {basis}")
    if slurm.time is None:
        yield Check("time", "doubt", "slurm.time is not set: the partition's default may be short")


def _folder(_config: Config, job: Job) -> Iterator[Check]:
    place = next(path for path in (job.folder, *job.folder.parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Check("checkpoint.folder", "bad", f"{place} cannot be written to")
        return
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", "--", str(place)], capture_output=True, text=True, timeout=60, check=False
    ).stdout.strip()
    free = shutil.disk_usage(place).free / 2**30
    text = f"{place}: {kind or 'unknown file system'}, {free:,.0f} GiB free"
    if kind in _LOCAL:
        yield Check("checkpoint.folder", "doubt", f"{text}; all nodes must see it: is it shared?")
    else:
        yield Check("checkpoint.folder", "ok", text)


def _python(config: Config, job: Job) -> Iterator[Check]:
    if config.slurm.container is not None:
        return
    python = config.slurm.python or sys.executable
    found = shutil.which(python, path=os.environ.get("PATH"))
    if found is None:
        yield Check(
            "slurm.python", "bad", f"{python} is no program here; the nodes need it at the same place"
        )
        return
    done = subprocess.run(
        [found, "-c", "import megatune; print(megatune.__version__)"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=job.workdir,
    )
    if done.returncode:
        yield Check(
            "slurm.python", "bad", f"{found} cannot import megatune: {done.stderr.strip().splitlines()[-1]}"
        )
    else:
        yield Check("slurm.python", "ok", f"{found}, megatune {done.stdout.strip()}")


def _container(config: Config, _job: Job) -> Iterator[Check]:
    container = config.slurm.container
    if container is None:
        return
    if container.runtime == "pyxis":
        if "--container-image" not in client.call("srun", "--help").stdout:
            yield Check(
                "pyxis", "bad", "srun has no --container-image here; use slurm.container.runtime: apptainer"
            )
    elif shutil.which("apptainer") is None:
        yield Check("apptainer", "doubt", "is not on this machine's PATH; the nodes need it")
    image = container.image
    if image.startswith(("/", ".")):
        exists = Path(image).exists()
        yield Check(
            "slurm.container.image", "ok" if exists else "bad", image if exists else f"{image} does not exist"
        )
    for mount in container.mounts:
        if not Path(mount.split(":")[0]).exists():
            yield Check("slurm.container.mounts", "doubt", f"{mount.split(':')[0]} does not exist here")


def _setup(config: Config, _job: Job) -> Iterator[Check]:
    setup = config.slurm.setup
    if setup is None:
        return
    if not Path(setup).is_file():
        yield Check("slurm.setup", "bad", f"{setup} is no file")
        return
    done = subprocess.run(["bash", "-n", setup], capture_output=True, text=True, timeout=60, check=False)
    yield Check("slurm.setup", "bad" if done.returncode else "ok", done.stderr.strip() or setup)
