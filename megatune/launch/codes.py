"""Exit codes of a job, for people and schedulers."""

from __future__ import annotations

import signal

USER_ERROR = 2  # a mistake that the user can mend: never started again
STOPPED = 75  # stopped on request, with a checkpoint: start again to go on
LOST = 76  # a node or its agent was lost, or a rank failed while stopping: starting again may help
NO_PROGRESS = 77  # failed again and again without getting further: a person has to look
CLEAN = (0, STOPPED)
KILLED = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT))


def of_status(returncode: int) -> int:
    """As a shell counts: 128 + signal for a process that a signal ended (-signal in Python)."""
    return returncode if returncode >= 0 else 128 - returncode


def how(code: int) -> str:
    """What happened to a process that ended with `code`."""
    if code - 128 not in signal.valid_signals():
        return f"failed with exit code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    text = f"was killed by {name}"
    return text + " (by the kernel if memory ran out: see dmesg)" if code == 128 + signal.SIGKILL else text
