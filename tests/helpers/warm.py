"""`megatune ARGUMENTS` as a fork of a server that has it imported, its ranks as forks of it: a start without the
seconds that imports take."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.dist import PRELOAD
from tests.helpers.faults import redirect
from tests.slurm import warm_agent


class Warm:
    """As much of subprocess.Popen as tests use; stdout and stderr come as one. `output`: a file for them."""

    def __init__(self, words: Sequence[str], output: Path, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._output = output
        self._process = context.Process(target=_megatune, args=(list(words), output, env))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("megatune", timeout)
        return self._output.read_text(), None


def _megatune(words: list[str], output: Path, env: dict[str, str]) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    redirect(said, said)
    warm_agent.main(words)
