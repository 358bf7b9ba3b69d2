"""What is on a disk when the power goes: every file operation of a save recorded, and replayed up to any of them.

The model is POSIX's, not any file system's: the bytes of a file are on the disk once the file was synced, the names in
a folder once the folder was; of all else any part may be there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatune.checkpoint import files


@dataclass
class Operation:
    """One operation on inode `node`: `link`, `unlink` and `rename` of names in a folder, `write` to a file. `synced`:
    after how many operations it was on the disk for certain; None: never."""

    kind: str
    node: int
    name: str = ""
    target: str = ""
    child: int = 0
    data: bytes = b""
    synced: int | None = None

    @property
    def is_data(self) -> bool:
        return self.kind == "write"


@dataclass
class Node:
    """A file (`data`) or a folder (`entries`: inodes by name)."""

    data: bytearray | None = None
    entries: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Records what `megatune.checkpoint.files` does in `base`. What is there at the beginning is on the disk.

    `ignored`: operations that are done but not recorded, as if the program forgot them.
    """

    def __init__(self, base: Path, ignored: tuple[str, ...] = ()) -> None:
        self.base = base
        self.operations: list[Operation] = []
        self._ignored = ignored
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._open: dict[int, int] = {}
        self.root = self._read(base)
        self.initial = {number: _copy(node) for number, node in self._nodes.items()}

    def _read(self, path: Path) -> int:
        number = self._new(Node() if path.is_dir() else Node(bytearray(path.read_bytes())))
        for inner in sorted(path.iterdir()) if path.is_dir() else []:
            self._nodes[number].entries[inner.name] = self._read(inner)
        return number

    def _new(self, node: Node) -> int:
        self._nodes[len(self._nodes)] = node
        return len(self._nodes) - 1

    def _at(self, path: Path) -> int:
        number = self.root
        for name in path.relative_to(self.base).parts:
            number = self._nodes[number].entries[name]
        return number

    @contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("make_folder", "create", "write", "sync", "close", "sync_folder", "rename"):
                patch.setattr(files, name, self._wrap(name, getattr(files, name)))
            patch.setattr(files, "remove_file", self._wrap("remove_file", files.remove_file))
            patch.setattr(files, "remove_tree", self._wrap("remove_tree", files.remove_tree))
            yield

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            with self._lock:
                before = args[0].exists() if name in ("remove_file", "remove_tree", "make_folder") else False
                result = original(*args)
                if name not in self._ignored:
                    getattr(self, f"_{name}")(*args, result=result, before=before)
                return result

        return operation

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        apply(self._nodes, operation)

    def _make_folder(self, path: Path, *, before: bool, **_: Any) -> None:
        if not before:
            self._add(Operation("link", self._at(path.parent), path.name, child=self._new(Node())))

    def _create(self, path: Path, *, result: int, **_: Any) -> None:
        number = self._new(Node(bytearray()))
        self._open[result] = number
        self._add(Operation("link", self._at(path.parent), path.name, child=number))

    def _write(self, descriptor: int, data: Any, **_: Any) -> None:
        self._add(Operation("write", self._open[descriptor], data=bytes(data)))

    def _sync(self, descriptor: int, **_: Any) -> None:
        self._mark(self._open[descriptor], is_data=True)

    def _close(self, descriptor: int, **_: Any) -> None:
        del self._open[descriptor]

    def _sync_folder(self, path: Path, **_: Any) -> None:
        self._mark(self._at(path), is_data=False)

    def _rename(self, source: Path, target: Path, **_: Any) -> None:
        assert source.parent == target.parent
        self._add(Operation("rename", self._at(source.parent), source.name, target.name))

    def _remove_file(self, path: Path, *, before: bool, **_: Any) -> None:
        if before:
            self._add(Operation("unlink", self._at(path.parent), path.name))

    def _remove_tree(self, path: Path, *, before: bool, **_: Any) -> None:
        if not before:
            return
        for name in sorted(self._nodes[self._at(path)].entries):
            self._add(Operation("unlink", self._at(path), name))
        self._add(Operation("unlink", self._at(path.parent), path.name))

    def _mark(self, node: int, *, is_data: bool) -> None:
        for operation in self.operations:
            if operation.node == node and operation.is_data == is_data and operation.synced is None:
                operation.synced = len(self.operations)

    def crash(
        self, count: int, survives: Callable[[Operation], bool], *, half: bool = False, zeros: bool = False
    ) -> dict[int, Node]:
        """The disk after the first `count` operations: those that were synced by then, and of the others those that
        `survives` names. `half`: the last one, if it writes, got only half-way. `zeros`: of lost bytes the file's new
        size is there."""
        nodes = {number: _copy(node) for number, node in self.initial.items()}
        for index, operation in enumerate(self.operations[:count]):
            is_on_disk = operation.synced is not None and operation.synced <= count
            data = operation.data
            if operation.is_data and half and index == count - 1:
                data = data[: len(data) // 2]
            elif operation.is_data and not is_on_disk and not survives(operation):
                data = bytes(len(data)) if zeros else b""
            elif not (is_on_disk or survives(operation)):
                continue
            apply(
                nodes,
                Operation(
                    operation.kind, operation.node, operation.name, operation.target, operation.child, data
                ),
            )
        return nodes


def apply(nodes: dict[int, Node], operation: Operation) -> None:
    """Do an operation; nothing where one before it that it needs is lost."""
    node = nodes.setdefault(operation.node, Node(bytearray() if operation.is_data else None))
    if operation.is_data:
        node.data += operation.data
    elif operation.kind == "link":
        node.entries[operation.name] = operation.child
    elif operation.kind == "unlink":
        if not nodes.get(node.entries.get(operation.name, -1), Node()).entries:
            node.entries.pop(operation.name, None)
    elif operation.name in node.entries:
        there = nodes.get(node.entries.get(operation.target, -1), Node())
        if not there.entries:
            node.entries[operation.target] = node.entries.pop(operation.name)


Tree = dict[str, Any]  # by name: bytes of a file, or the tree of a folder


def tree_of(nodes: dict[int, Node], kinds: dict[int, bool], number: int) -> Tree:
    """What lies in the folder with inode `number`. `kinds`: whether an inode is a folder."""
    return {
        name: tree_of(nodes, kinds, child) if kinds[child] else bytes(nodes.get(child, Node()).data or b"")
        for name, child in sorted(nodes.get(number, Node()).entries.items())
    }


def write_out(tree: Tree, path: Path) -> None:
    """Make the folder `path` with what is in `tree`."""
    path.mkdir()
    for name, what in tree.items():
        if isinstance(what, bytes):
            (path / name).write_bytes(what)
        else:
            write_out(what, path / name)


def kinds_of(recorder: Recorder) -> dict[int, bool]:
    return {number: node.data is None for number, node in recorder._nodes.items()}


def _copy(node: Node) -> Node:
    return Node(None if node.data is None else bytearray(node.data), dict(node.entries))
