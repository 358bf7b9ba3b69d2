"""Values as words of bash and of `#SBATCH` lines: what comes out on the other side is the value, byte for byte."""

from __future__ import annotations

import re

from megatune.errors import ConfigError

_PLAIN = re.compile(rb"[A-Za-z0-9_@%+=:,./-]+")
_PRINTABLE = re.compile(rb"[ -&(-~]*")  # ASCII without the single quote
_SHORT = {0x07: "a", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0B: "v", 0x0C: "f", 0x0D: "r", 0x27: "'", 0x5C: "\\"}
# Slurm's daemons refuse a field of more than 1024 bytes (seen with 22.05).
MAX_DIRECTIVE = 1000


def to_bytes(value: str, key: str) -> bytes:
    """UTF-8; bytes of a path that are none stay as they are. Raises ConfigError where bash could not hold it."""
    if "\0" in value:
        raise ConfigError(f"{key}: holds a NUL character, which no shell can pass on; take it out")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}: holds half of a surrogate pair, which is no character; take it out"
        ) from None


def bash_word(value: str, key: str = "value") -> str:
    """`value` as one word of bash that expands to exactly its bytes, in ASCII and on one line.

    Everything but plain printable ASCII is written as `$'...'` with escapes, so that neither the locale of the node
    nor an editor on the way can change it. Raises ConfigError for a NUL.
    """
    data = to_bytes(value, key)
    if _PLAIN.fullmatch(data):
        return data.decode("ascii")
    if _PRINTABLE.fullmatch(data):
        return f"'{data.decode('ascii')}'"
    return f"$'{''.join(_escaped(byte) for byte in data)}'"


def _escaped(byte: int) -> str:
    if byte in _SHORT:
        return "\\" + _SHORT[byte]
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"


def directive_word(value: str, key: str) -> bytes:
    """`value` as the argument of an option in an `#SBATCH` line.

    These lines are read by sbatch, not by a shell: a double-quoted string in which a backslash makes the next
    character itself; a line end cannot be said. Raises ConfigError for control characters and for what Slurm would
    refuse as too long.
    """
    data = to_bytes(value, key)
    if any(byte < 0x20 or byte == 0x7F for byte in data):
        raise ConfigError(
            f"{key}: {value!r} holds a control character or a line end, which an #SBATCH line cannot; take it out"
        )
    if len(data) > MAX_DIRECTIVE:
        raise ConfigError(f"{key}: {len(data)} bytes; Slurm takes at most {MAX_DIRECTIVE} in one option")
    if _PLAIN.fullmatch(data):
        return data
    return b'"' + data.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def file_pattern(path: str, key: str) -> str:
    """A path for `--output`, where Slurm replaces `%j` and its like: each percent sign means itself.

    Raises ConfigError for a backslash, which would switch off the replacement for the whole name.
    """
    if "\\" in path:
        raise ConfigError(
            f"{key}: {path} holds a backslash, which Slurm takes for a sign of its own; rename it"
        )
    return path.replace("%", "%%")
