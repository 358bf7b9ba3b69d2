"""Runs on a Slurm cluster: render a batch script, submit it, look after it."""

from megatune.launch.slurm.script import Job, render
from megatune.launch.slurm.submission import Submission, newest, requeue, stop, submit

__all__ = ["Job", "Submission", "newest", "render", "requeue", "stop", "submit"]
