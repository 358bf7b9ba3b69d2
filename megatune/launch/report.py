"""One report for many ranks: a rank that fails leaves its error for the launcher, which prints the first one only."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatune.errors import MegatuneError
from megatune.launch import codes

FAILURE_FILE = "MEGATUNE_FAILURE_FILE"
MAX_TEXT = 16_000  # characters of a traceback that are kept; its end counts


@dataclass(frozen=True)
class Failure:
    """`time`: seconds since the epoch when the error was raised to the top; `text`: the message alone for a user's
    error, else the traceback."""

    time: float
    is_user_error: bool
    text: str


@dataclass(frozen=True)
class Death:
    """A rank that failed, as node 0 knows it. `code`: exit code; `at`: when, on node 0's monotonic clock; `step` and
    `where`: what it was doing; `text`: traceback, message or last lines; `is_first_hand`: not only a consequence of
    being told to end."""

    rank: int
    host: str
    code: int
    at: float
    step: int
    where: str
    text: str
    log: str
    is_user_error: bool
    is_reported: bool
    is_first_hand: bool


def record(error: BaseException) -> bool:
    """Leave `error` to the launcher that started this process. False where none did: print it here then."""
    target = os.environ.get(FAILURE_FILE)
    if not target:
        return False
    is_user_error = isinstance(error, MegatuneError)
    text = str(error) if is_user_error else "".join(traceback.format_exception(error))
    unfinished = Path(f"{target}.unfinished")
    try:
        unfinished.write_text(json.dumps({"time": time.time(), "is_user_error": is_user_error, "text": text}))
        os.replace(unfinished, target)
    except OSError:
        return False
    return True


def recorded(path: Path) -> Failure | None:
    """What a rank left; None where it left nothing."""
    try:
        return Failure(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def first(deaths: Sequence[Death]) -> Death | None:
    """The one that the others follow from; None where all only did what they were told."""
    causes = [death for death in deaths if death.is_first_hand]
    return min(causes, key=lambda death: (death.at, death.rank), default=None)


def describe(death: Death, world_size: int, nodes: int) -> str:
    """Some lines for a person: who, how, where, doing what, the first traceback, where to read more."""
    others = f"; the other {world_size - 1} were ended" if world_size > 1 else ""
    on = f" on {death.host}" if nodes > 1 else f" ({death.host})"
    lines = [f"rank {death.rank} of {world_size}{on} {codes.how(death.code)} {death.where}{others}"]
    lines += [f"  {line}" for line in death.text.rstrip().splitlines()]
    if death.log:
        lines.append(f"  output of rank {death.rank}: {death.log}")
    return "\n".join(lines)
