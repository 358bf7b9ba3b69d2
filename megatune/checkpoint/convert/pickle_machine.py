"""Pickles read as data: nothing that a pickle names is imported, and nothing is called but a few functions of ours.

Python's own unpickler calls what the file says, even with a restricted `find_class` (`__setstate__`, `__reduce__` of
whatever was let in, attributes set on classes). This one is an interpreter of the opcodes (protocols 2 to 5, documented
in Python's `pickletools`) that knows lists, dicts, tuples, strings and numbers; classes are names, and their instances
are `Opaque` objects that hold what the pickle would have given to the class.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatune.errors import CheckpointError

MOST_OBJECTS = 1 << 24  # about 1 GiB of lists, numbers and strings
_MOST_DIGITS = 1024  # bytes of one integer
_KEY_DEPTH, _KEY_ITEMS = 4, 1000  # of a tuple used as a dictionary's key: hashing recurses in C
# Modules and functions that no checkpoint has a reason to name. Naming them would do nothing here; refusing them says
# what the file is.
_UNSAFE_NAMES = (
    "os posix nt subprocess sys shutil socket pty commands runpy importlib imp pkgutil code codeop ctypes "
    "_ctypes webbrowser asyncio multiprocessing pdb bdb timeit cProfile profile trace pip setuptools "
    "distutils pickle _pickle cPickle marshal shelve dill cloudpickle joblib operator _operator "
    "types.FunctionType types.CodeType inspect gc tempfile glob io.open _io.open io.FileIO _io.FileIO "
    "fileinput linecache urllib http requests ftplib smtplib telnetlib xmlrpc zipimport site torch.hub "
    "torch.load torch.jit torch.package torch.utils.cpp_extension torch.utils.model_zoo "
    "torch.serialization.load numpy.load numpy.testing numpy.f2py"
)
_UNSAFE = frozenset(_UNSAFE_NAMES.split())
_SAFE_NAMES = (
    "object bool int float complex str bytes bytearray list tuple dict set frozenset slice range type "
    "NoneType Ellipsis NotImplemented"
)
_SAFE_BUILTINS = frozenset(_SAFE_NAMES.split())
_BUILTINS = ("builtins", "__builtin__")
_MARK = object()


@dataclass(eq=False, slots=True)
class Opaque:
    """What stands for a class or function that the pickle names (`args` is None) or for what it would have returned.

    `name`: module.qualified_name. `args`, `kwargs`: what it would have been called with. `state`: what `__setstate__`
    would have got. `items`: what would have been appended or set (pairs), for subclasses of list and dict.
    """

    name: str
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def attributes(self) -> dict[str, Any]:
        """The instance's `__dict__`, slots included, as far as its state is in the usual form."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {str(k): v for part in parts if isinstance(part, dict) for k, v in part.items()}

    def __repr__(self) -> str:
        return f"Opaque({self.name})"


class PickleMachine:
    """One pickle being read.

    `data`: the stream. `where`: for messages. `functions`: module.name -> what to call in its place, with arguments of
    any kind: they check them (TypeError, ValueError: damaged). `values`: module.name -> what the name stands for.
    `persistent`: what to make of a persistent id. `stop`: where in `data` the pickle ended, once `run` returned.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        where: str,
        *,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None = None,
        start: int = 0,
    ) -> None:
        self._data, self.where, self.stop = memoryview(data), where, start
        self._functions, self._values, self._persistent = functions, values, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._names: dict[str, Any] = {}
        self._budget = MOST_OBJECTS

    def run(self) -> Any:
        """The object; CheckpointError where the stream is damaged, too big, or asks for what only an attack does."""
        try:
            return self._run()
        except (
            IndexError,
            KeyError,
            ValueError,
            TypeError,
            OverflowError,
            AttributeError,
            struct.error,
        ) as error:
            raise self.error("it is damaged or no pickle of a checkpoint") from error

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}; nothing in it was run; get the checkpoint again")

    def _run(self) -> Any:
        data = self._data
        while True:
            code = data[self.stop]
            self.stop += 1
            if code == 0x2E:  # STOP
                return self.pop()
            action = _OPCODES.get(code)
            if action is None:
                raise self.error(f"byte {self.stop - 1} is opcode {code:#x}, which no checkpoint has")
            action(self)
            if self._budget < 0:
                raise self.error(f"its pickle makes more than {MOST_OBJECTS} objects")

    # What the opcodes share.

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self._data) - self.stop:
            raise ValueError("past the end")
        self.stop += count
        return self._data[self.stop - count : self.stop]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push(self, value: Any) -> None:
        self._budget -= 1
        self._stack.append(value)

    def line(self) -> str:
        limit = min(len(self._data), self.stop + 1000)
        end = bytes(self._data[self.stop : limit]).index(b"\n")
        text = str(self.take(end), "utf-8")
        self.stop += 1
        return text

    def since_mark(self) -> list[Any]:
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        values = stack[place + 1 :]
        del stack[place:]
        return values

    # Names and what becomes of them.

    def named(self, module: str, name: str) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 1000:
            raise ValueError("no name")
        full = f"{module}.{name}"
        if full not in self._names:
            self._names[full] = self._values[full] if full in self._values else self._class(module, full)
        self.push(self._names[full])

    def _class(self, module: str, full: str) -> Opaque:
        if full in self._functions:
            return Opaque(full)
        parts = full.split(".")
        unsafe = any(".".join(parts[: n + 1]) in _UNSAFE for n in range(len(parts)))
        if module in _BUILTINS:
            unsafe = full.removeprefix(f"{module}.") not in _SAFE_BUILTINS
        if unsafe:
            raise self.error(f"its pickle asks to run {full}, which no checkpoint needs: it may be an attack")
        return Opaque(full)

    def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        """What stands for `function(*args)`. Also reached from our functions for calls within calls."""
        if not isinstance(function, Opaque) or function.args is not None:
            raise self.error("its pickle calls what is no class or function: it may be an attack")
        if not isinstance(args, tuple) or not isinstance(kwargs or {}, dict):
            raise ValueError("no arguments")
        ours = self._functions.get(function.name)
        if ours is None:
            self._budget -= 2
            return Opaque(function.name, args, dict(kwargs or {}))
        self._budget -= sum(len(one) for one in args if isinstance(one, (str, bytes, list, dict, set, tuple)))
        if self._budget < 0:
            raise self.error(f"its pickle makes more than {MOST_OBJECTS} objects")
        if kwargs:
            raise ValueError("keywords")
        return ours(*args)

    def built(self, target: Any, state: Any) -> Any:
        """`target` with its state: data classes of ours and plain containers have none, and keep what they are."""
        if isinstance(target, Opaque):
            if target.args is None:
                raise self.error(
                    f"its pickle sets attributes of the class {target.name}: it may be an attack"
                )
            if not isinstance(state, dict):
                target.state = state
                return target
            self._budget -= len(state)
            if isinstance(target.state, dict):
                target.state.update(state)
            else:
                target.state = dict(state)
        return target

    def put(self, target: Any, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, Opaque) and target.args is not None:
                target.items.append((key, value))
            elif type(target) is dict:
                target[checked_key(key)] = value
            else:
                raise ValueError("no dictionary")

    def append(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Opaque) and target.args is not None:
            target.items.extend(values)
        elif type(target) is list:
            target.extend(values)
        elif type(target) is set:
            target.update(checked_key(value) for value in values)
        else:
            raise ValueError("no list")

    def top(self) -> Any:
        return self._stack[-1]

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark is no value")
        return value

    def remember(self, place: int) -> None:
        if place not in self._memo:
            self._budget -= 1
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark is no value")
        self._memo[place] = value

    def recall(self, place: int) -> None:
        self._budget -= 1
        self._stack.append(self._memo[place])

    def integer(self, count: int) -> None:
        if count > _MOST_DIGITS:
            raise ValueError("a number that long")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def text(self, count: int) -> None:
        self.push(str(self.take(count), "utf-8", "surrogatepass"))

    def latin(self, count: int) -> None:
        self.push(str(self.take(count), "latin-1"))

    def octets(self, count: int) -> None:
        self.push(bytes(self.take(count)))

    def again(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def drop(self) -> None:
        self._stack.pop()

    def drop_mark(self) -> None:
        self.since_mark()

    def protocol(self, version: int) -> None:
        if version > 5:
            raise ValueError("a protocol of the future")

    def persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("a reference to another file")
        self.push(self._persistent(self.pop()))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def new_with_keywords(self) -> None:
        kwargs, args, kind = self.pop(), self.pop(), self.pop()
        self.push(self.call(kind, args, kwargs))

    def build(self) -> None:
        state = self.pop()
        self._stack[-1] = self.built(self.top(), state)

    def last(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def name_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def append_one(self) -> None:
        value = self.pop()
        self.append(self.top(), [value])

    def put_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.put(self.top(), [key, value])

    def append_many(self) -> None:
        values = self.since_mark()
        self.append(self.top(), values)

    def put_many(self) -> None:
        values = self.since_mark()
        self.put(self.top(), values)

    def dictionary(self) -> None:
        made: dict[Any, Any] = {}
        self.put(made, self.since_mark())
        self.push(made)


def checked_key(key: Any) -> Any:
    """`key`, where it can be hashed in little time and depth; ValueError otherwise."""
    left = _KEY_ITEMS

    def check(value: Any, depth: int) -> None:
        nonlocal left
        left -= 1
        if isinstance(value, tuple):
            if depth == 0 or len(value) > left:
                raise ValueError("a key that deep")
            for item in value:
                check(item, depth - 1)
        elif isinstance(value, (list, dict, set, bytearray)):
            raise ValueError("a key that can change")

    check(key, _KEY_DEPTH)
    return key


def _table() -> dict[int, Callable[[PickleMachine], None]]:
    machine = PickleMachine
    table: dict[int, Callable[[PickleMachine], None]] = {
        ord("("): lambda m: m._stack.append(_MARK),
        ord("0"): lambda m: m.drop(),
        ord("1"): lambda m: m.drop_mark(),
        ord("2"): lambda m: m.push(m.again()),
        ord("K"): lambda m: m.push(m.number("<B")),
        ord("M"): lambda m: m.push(m.number("<H")),
        ord("J"): lambda m: m.push(m.number("<i")),
        ord("G"): lambda m: m.push(m.number(">d")),
        0x8A: lambda m: m.integer(m.number("<B")),
        0x8B: lambda m: m.integer(m.number("<i")),
        ord("U"): lambda m: m.latin(m.number("<B")),
        ord("T"): lambda m: m.latin(m.number("<i")),
        0x8C: lambda m: m.text(m.number("<B")),
        ord("X"): lambda m: m.text(m.number("<I")),
        0x8D: lambda m: m.text(m.number("<Q")),
        ord("C"): lambda m: m.octets(m.number("<B")),
        ord("B"): lambda m: m.octets(m.number("<I")),
        0x8E: lambda m: m.octets(m.number("<Q")),
        0x96: lambda m: m.octets(m.number("<Q")),  # a bytearray
        ord("t"): lambda m: m.push(tuple(m.since_mark())),
        ord("l"): lambda m: m.push(m.since_mark()),
        0x91: lambda m: m.push(frozenset(map(checked_key, m.since_mark()))),
        ord("c"): lambda m: m.named(m.line(), m.line()),
        ord("q"): lambda m: m.remember(m.number("<B")),
        ord("r"): lambda m: m.remember(m.number("<I")),
        0x94: lambda m: m.remember(len(m._memo)),
        ord("h"): lambda m: m.recall(m.number("<B")),
        ord("j"): lambda m: m.recall(m.number("<I")),
        0x80: lambda m: m.protocol(m.number("<B")),
        0x95: lambda m: m.take(8) and None,  # a frame: the pickle goes on in it
        ord("d"): machine.dictionary,
        ord("a"): machine.append_one,
        ord("e"): machine.append_many,
        0x90: machine.append_many,
        ord("s"): machine.put_one,
        ord("u"): machine.put_many,
        ord("Q"): machine.persistent_id,
        ord("R"): machine.reduce,
        0x81: machine.reduce,  # `kind.__new__(kind, *args)`: the same for us
        0x92: machine.new_with_keywords,
        ord("b"): machine.build,
        0x93: machine.name_on_stack,
    }
    made = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
    table |= {code: lambda m, value=value: m.push(value) for code, value in made.items()}
    fresh = {ord("]"): list, ord("}"): dict, 0x8F: set}
    table |= {code: lambda m, kind=kind: m.push(kind()) for code, kind in fresh.items()}
    table |= {0x84 + n: lambda m, n=n: m.last(n) for n in (1, 2, 3)}
    return table


_OPCODES = _table()
