"""One report for many ranks: a rank that fails leaves its error for the launcher, which prints the first one only."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megatune.errors import MegatuneError

FAILURE_FILE = "MEGATUNE_FAILURE_FILE"


@dataclass(frozen=True)
class Failure:
    """`time`: seconds since the epoch when the error was raised to the top; `text`: the message alone for a user's
    error, else the traceback."""

    time: float
    is_user_error: bool
    text: str


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
