"""A real Slurm on this machine, for tests: a controller and two nodes in namespaces (two_nodes.sh)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_nodes.sh")
TOOLS = ("/usr/sbin/slurmctld", "/usr/sbin/slurmd", "/usr/bin/sbatch", "/usr/sbin/munged")
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
}


class NotHere(Exception):
    """There can be no cluster on this machine."""


def why_not() -> str | None:
    """What is missing for a cluster here; None where there is nothing."""
    if os.geteuid() != 0:
        return "needs root, for network and PID namespaces"
    missing = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if not all(Path(tool).exists() for tool in TOOLS) and shutil.which("apt-get") is None:
        return "needs Slurm's packages (slurmctld slurmd slurm-client munge)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this machine does not allow namespaces"


class Cluster:
    """`folder`: the cluster's own; `environ`: for commands that should find its sbatch, squeue ..."""

    nodes = ("node1", "node2")

    def __init__(self, folder: Path, subnet: str) -> None:
        self.folder = folder
        self._own = {"SLURM2_DIR": str(folder), "SLURM2_SUBNET": subnet}
        self.environ = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SLURM_CONF": f"{folder}/slurm.conf",
        }

    def script(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A verb of two_nodes.sh."""
        done = subprocess.run(
            [str(SCRIPT), *words],
            env={**os.environ, **self._own},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def call(self, *words: str, check: bool = True) -> str:
        """One of Slurm's commands, as on a login node; what it printed."""
        done = subprocess.run(
            words,
            env=self.environ,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def restarts(self, job: str) -> int:
        return int(self.call("squeue", "-h", "-t", "all", "-j", job, "-O", "RestartCnt").strip())

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        """The job's state once it is one of `states` (default: any in which it has ended)."""
        wanted = set(states) or ENDED
        until(
            lambda: self.state(job) in wanted,
            seconds,
            lambda: f"job {job} is {self.state(job)}, not {wanted}",
        )
        return self.state(job)

    def kill_node(self, node: str) -> None:
        """As a crash: its slurmd, its steps and all of its processes are gone at once."""
        self.script("node-kill", node)

    def start_node(self, node: str) -> None:
        """Start a node that was killed (nothing where it runs), and wait until it takes jobs."""
        self.script("node-start", node)
        until(
            lambda: (
                self.call("sinfo", "-h", "-n", node, "-p", "main", "-o", "%t").strip()
                in ("idle", "mix", "alloc")
            ),
            60,
        )

    def quiet(self) -> None:
        """No jobs, all nodes up: as each test begins."""
        jobs = self.call("squeue", "-h", "-o", "%i").split()
        if jobs:
            self.call("scancel", *jobs, check=False)
        until(lambda: not self.call("squeue", "-h", "-o", "%i").strip(), 60)
        for node in self.nodes:
            self.start_node(node)
        idle = len(self.nodes) * ["idle"]
        until(lambda: self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == idle, 60)


def until(
    condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "it did not happen"
) -> None:
    """Wait for something; AssertionError with `why()` where it has not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{why()} after {seconds} s"
        time.sleep(0.2)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that is there as long as the context is."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: sockets lie in it
    cluster = Cluster(folder, f"10.77.{os.getpid() % 250 + 1}")
    has_packages = all(Path(tool).exists() for tool in TOOLS)
    try:
        started = cluster.script("up", check=has_packages)
        if started.returncode:
            raise NotHere(f"Slurm's packages could not be installed: {started.stderr.strip()[-200:]}")
        yield cluster
    finally:
        cluster.script("down", check=False)
        shutil.rmtree(folder, ignore_errors=True)
