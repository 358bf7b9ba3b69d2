"""Addresses, ports and interfaces of this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from megatune.errors import ParallelError


def listen(host: str, port: int) -> socket.socket:
    """A socket that agents of other nodes can reach under `host`, and, where possible, nobody elsewhere.

    Raises ParallelError where the port is taken.
    """
    address = address_of(host)
    # A machine's own name often means its loopback; others mean a real interface by it.
    if address and ipaddress.ip_address(address).is_loopback and not _is_loopback_text(host):
        address = ""
    last: OSError | None = None
    for candidate in dict.fromkeys((address, "")):  # a name may also mean an address that a router translates
        family = socket.AF_INET6 if ":" in candidate else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((candidate, port))
            sock.listen(1024)
        except OSError as error:
            sock.close()
            last = error
            continue
        sock.setblocking(False)
        return sock
    raise ParallelError(
        f"--endpoint {host}:{port}: cannot be listened on here ({last.strerror}); choose another port"
    )


def address_of(host: str) -> str:
    """The numeric address that `host` means here; empty where it means nothing."""
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ""


def _is_loopback_text(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def interface_of(address: str) -> str | None:
    """The network interface that has this numeric address."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def split_endpoint(text: str) -> tuple[str, int]:
    """HOST:PORT or [ADDRESS]:PORT. Raises ParallelError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ParallelError(f"--endpoint {text}: must read HOST:PORT, for example node1:29400")
    return host, int(port)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port for rank 0's store that nobody else can get meanwhile.

    A socket that is bound with SO_REUSEADDR but does not listen keeps the kernel from handing the port out, and still
    lets rank 0 (whose store sets SO_REUSEADDR, too) listen on it. Bound like the store's own: on all addresses.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
