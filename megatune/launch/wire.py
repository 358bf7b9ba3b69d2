"""What agents of one job say to each other: JSON objects, one a line, over TCP.

Both sides prove that they know the job's key before anything else is read: the server sends a nonce, the client its
node, a nonce of its own and an HMAC of all of them, the server an HMAC back. The key comes from the run's id, its
generation and a secret that the job's environment holds, so an agent of another job, or of an earlier start of this
one, is not let in. Lines and buffers are bounded. The text itself is not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import time
from typing import Any

SECRET = "MEGATUNE_SECRET"
GREETING_BYTES = 1024  # the longest line of somebody who has not proved anything yet
GREETING_SECONDS = 10.0
LINE_BYTES = 2**20
OUTBOX_BYTES = 8 * 2**20

Message = dict[str, Any]


def job_key(secret: str, run_id: str, generation: int) -> bytes:
    return hmac.digest(secret.encode(), f"megatune agent\n{run_id}\n{generation}".encode(), "sha256")


class Wire:
    """A connection, never blocking: `receive` gives what has come, `flush` sends what can be sent. `is_open` is False
    once the other side is gone or has said something that is no message."""

    def __init__(self, sock: socket.socket, received: bytes = b"") -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel notices a machine that is gone, also while this process is busy: after 3 s of silence it asks
        # every 2 s, and data that nobody acknowledges for 10 s ends the connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
        self.sock = sock
        self.is_open = True
        self.limit = LINE_BYTES
        self._inbox = bytearray(received)
        self._outbox = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message) -> None:
        self._outbox += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(self._outbox) > OUTBOX_BYTES:
            self.is_open = False
        self.flush()

    def flush(self) -> None:
        while self._outbox and self.is_open:
            try:
                del self._outbox[: self.sock.send(self._outbox)]
            except BlockingIOError:
                return
            except OSError:
                self.is_open = False

    def receive(self) -> list[Message]:
        """Whole messages that are here."""
        found = self._lines()
        while self.is_open:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.is_open = bool(data)
            self._inbox += data
            found += self._lines()
        return found

    def close(self) -> None:
        self.is_open = False
        self.sock.close()

    def _lines(self) -> list[Message]:
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = bytearray(rest)
        try:
            found = [json.loads(line) for line in lines]
            if max(map(len, (*lines, rest))) > self.limit or not all(isinstance(one, dict) for one in found):
                raise ValueError
        except (ValueError, RecursionError):
            self.is_open = False
            return []
        return found


class Greeting:
    """The server's side of a connection that has not yet proved anything."""

    def __init__(self, sock: socket.socket, key: bytes, nodes: int) -> None:
        self.wire = Wire(sock)
        self.wire.limit = GREETING_BYTES
        self.deadline = time.monotonic() + GREETING_SECONDS
        self._key, self._nodes = key, nodes
        self._nonce = secrets.token_hex(16)
        self.wire.send({"nonce": self._nonce})

    def node(self) -> int | None:
        """The node that this is, once it has proved it. The wire is closed where it cannot."""
        messages = self.wire.receive()
        if not messages:
            if not self.wire.is_open or time.monotonic() > self.deadline:
                self.wire.close()
            return None
        said = messages[0]
        node, theirs = said.get("node"), said.get("nonce")
        good = len(messages) == 1 and type(node) is int and 0 < node < self._nodes
        good = good and isinstance(theirs, str) and isinstance(said.get("proof"), str)
        expected = _proof(self._key, "client", self._nonce, theirs, node) if good else ""
        if not good or not hmac.compare_digest(said["proof"].encode(), expected.encode()):
            self.wire.close()
            return None
        self.wire.send({"proof": _proof(self._key, "server", self._nonce, theirs, node)})
        self.wire.limit = LINE_BYTES
        return node


def connect(host: str, port: int, key: bytes, node: int, timeout: float) -> Wire | str:
    """One attempt to reach node 0's agent: a wire, or why there is none (yet)."""
    try:
        sock = socket.create_connection((host, port), timeout)
    except OSError as error:
        return f"nothing answers there ({error.strerror or error})"
    try:
        sock.settimeout(timeout)
        greeting, rest = _line(sock, b"")
        nonce = secrets.token_hex(16)
        theirs = str(greeting["nonce"])
        proof = _proof(key, "client", theirs, nonce, node)
        sock.sendall(json.dumps({"node": node, "nonce": nonce, "proof": proof}).encode() + b"\n")
        answer, rest = _line(sock, rest)
        expected = _proof(key, "server", theirs, nonce, node)
        if not hmac.compare_digest(str(answer.get("proof")).encode(), expected.encode()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sock.close()
        return "what answers there is not node 0 of this start (run id, generation or secret differ)"
    return Wire(sock, rest)


def _line(sock: socket.socket, data: bytes) -> tuple[Message, bytes]:
    while b"\n" not in data:
        more = sock.recv(GREETING_BYTES)
        if not more or len(data) > GREETING_BYTES:
            raise ValueError("no greeting")
        data += more
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def _proof(key: bytes, who: str, server_nonce: str, client_nonce: str, node: int) -> str:
    text = f"{who}\n{server_nonce}\n{client_nonce}\n{node}".encode()
    return hmac.new(key, text, hashlib.sha256).hexdigest()
