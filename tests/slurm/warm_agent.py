"""An agent whose ranks are forked from it, with torch and megatune imported: a start costs one process's imports a
node, and a restart none. All else is the real agent's: `python -m tests.slurm.warm_agent agent ...` is
`megatune agent ...`.

MEGATUNE_TEST_PACE names a file with the seconds that a step takes at least; without the file it takes what it takes.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatune.launch import ranks
from megatune.training.heartbeat import Heartbeat
from tests.helpers.dist import PRELOAD
from tests.helpers.faults import Forked, forked

PACE = "MEGATUNE_TEST_PACE"


def _fork(command: Sequence[str], variables: Mapping[str, str], stdout: int, stderr: int) -> Forked:
    words = list(command[command.index("megatune") + 1 :])
    return forked(lambda: _rank(words), variables, stdout, stderr)


def _rank(words: list[str]) -> None:
    from megatune import cli

    pace = os.environ.get(PACE)
    if pace is not None:
        _keep_pace(Path(pace))
    cli.commands(args=words, prog_name="megatune")


def _keep_pace(file: Path) -> None:
    plain, last = Heartbeat.begin, time.monotonic()

    def begin(self: Heartbeat, step: int) -> None:
        nonlocal last
        seconds = float(file.read_text()) if file.exists() else 0.0
        time.sleep(max(0.0, last + seconds - time.monotonic()))
        last = time.monotonic()
        plain(self, step)

    Heartbeat.begin = begin


def main(words: list[str]) -> None:
    """Be `megatune *words`."""
    for name in PRELOAD:
        importlib.import_module(name)
    from megatune import cli
    from megatune.ops._load import cpu_problem

    cpu_problem()  # the kernels are loaded, or it is known that there are none
    ranks._popen = _fork
    cli.commands(args=words, prog_name="megatune")


if __name__ == "__main__":
    main(sys.argv[1:])
