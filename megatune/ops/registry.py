"""Which body computes an op: chosen by device and dtype, overridable, printed once at the start of a run.

An op has one name and several bodies: "reference" (plain PyTorch, the truth, runs everywhere), "cpu" (compiled,
csrc/cpu), "compiled" (the reference through torch.compile, on CUDA), "cuda" (csrc/cuda), and for attention PyTorch's
own kernels. The kernels with a compiled body are operators of the torch library `megatune`, defined here in Python
with the reference as their implementation on every device; `_cpu.so` and `_cuda.so` add their own. So FakeTensor, meta
tensors and torch.compile see one operator, whatever is built.

Autograd is one `torch.autograd.Function` per op, in eager mode and under torch.compile alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from megatune.errors import ConfigError
from megatune.ops._load import cpu_isa, cpu_problem, cuda_problem

LIBRARY = torch.library.Library("megatune", "DEF")
LOW_AND_SINGLE = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Body:
    """One way to compute an op.

    `run`: the functions that do it (an op's own convention). `devices`, `dtypes`: what it takes (None: any).
    `features`: what it can do of what a call may ask for (None: all; only attention has features), or a function that
    finds out, which is called for devices that the body runs on alone. `problem`: says
    why it cannot run on this machine, None if it can.
    """

    name: str
    run: Any
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    features: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None
    problem: Callable[[], str | None] = lambda: None

    def unfit(
        self, device_type: str, dtype: torch.dtype | None = None, features: tuple[str, ...] = ()
    ) -> str | None:
        """Why this body cannot compute on that device (with that dtype and those features), None if it can."""
        if self.devices is not None and device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device_type}"
        if dtype is not None and self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' and '.join(str(known)[6:] for known in self.dtypes)}, not {str(dtype)[6:]}"
        known = self.features() if callable(self.features) else self.features
        if known is not None and any(feature not in known for feature in features):
            return f"it cannot do {' and '.join(sorted(set(features) - set(known)))}"
        return self.problem()


@dataclass
class Op:
    """The bodies of one op, the best first; the last one, "reference", runs everywhere."""

    name: str
    bodies: dict[str, Body]
    wanted: dict[str, str] = field(default_factory=dict)  # device type -> body asked for with configure()
    picked: dict[tuple[str, torch.dtype, tuple[str, ...]], Body] = field(default_factory=dict)
    stand_in: Body | None = None  # within `shapes_only`

    def pick(self, device_type: str, dtype: torch.dtype, features: tuple[str, ...] = ()) -> Body:
        """The body for tensors of this device and dtype. ValueError where the one asked for cannot take them."""
        body = self.stand_in
        if body is None or not (body.dtypes is None or dtype in body.dtypes):
            body = self.picked.get((device_type, dtype, features))
        if body is None:
            body = self.choices(device_type, dtype, features)[0]
            reason = body.unfit(device_type, dtype, features)
            if reason is not None:
                raise ValueError(f"{self.name}: ops.backend asks for body {body.name!r}, but here {reason}")
            self.picked[device_type, dtype, features] = body
        return body

    def choices(
        self, device_type: str, dtype: torch.dtype | None, features: tuple[str, ...] = ()
    ) -> list[Body]:
        """The body asked for with `configure` (whether it can or not), or else all that can, the best first."""
        if device_type in self.wanted:
            return [self.bodies[self.wanted[device_type]]]
        return [body for body in self.bodies.values() if body.unfit(device_type, dtype, features) is None]


OPS: dict[str, Op] = {}


def add_op(name: str, bodies: Sequence[Body]) -> Op:
    """Registers an op with its bodies, the best first."""
    assert bodies[-1].name == "reference", "the reference is the last choice"
    OPS[name] = Op(name, {body.name: body for body in bodies})
    return OPS[name]


def nothing(*args: object, **more: object) -> None:
    """The fake of operators that only write into their arguments."""


def define(schema: str, reference: Callable, fake: Callable) -> Any:
    """Defines the operator megatune::<schema>, computed by `reference` until a library adds a kernel; returns it."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatune::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.megatune, name).default


def cpu_body(*run: Any) -> Body:
    """The compiled CPU kernels as a body: `run` are operators made with `define`."""
    return Body("cpu", run, ("cpu",), LOW_AND_SINGLE, problem=cpu_problem)


def compiled_body(*run: Callable) -> Body:
    """Functions made with `fuse` as a body: one Triton kernel or two instead of many, on CUDA."""
    return Body("compiled", run, ("cuda",), problem=inductor_problem)


def cuda_body(*run: Any) -> Body:
    """The compiled CUDA kernels as a body: `run` are operators made with `define`.

    An op lists it before "compiled" once it has been measured to be the faster one; until then it runs only where
    `ops.backend` asks for it.
    """
    return Body("cuda", run, ("cuda",), CUDA_DTYPES, problem=cuda_problem)


def fuse(function: Callable) -> Callable:
    """function through torch.compile, for any sizes.

    Each kind of arguments (dtypes, numbers of dimensions, flags) has a compiled function of its own: torch.compile
    gives up after eight kinds of one function and runs it eagerly from then on, slower and with other rounding.
    """
    compiled: dict[tuple, Callable] = {}

    def run(*args: Any) -> Any:
        # Inside someone else's torch.compile it is traced and fused with what surrounds it.
        if torch.compiler.is_compiling():
            return function(*args)
        kind = tuple(map(_kind, args))
        if kind not in compiled:
            compiled[kind] = torch.compile(_copy(function), dynamic=True)
        return compiled[kind](*args)

    return run


def _kind(value: Any) -> Any:
    """What torch.compile makes another kernel for: anything but the sizes of tensors and whole numbers."""
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.requires_grad
    return int if type(value) is int else value


def _copy(function: Callable) -> Callable:
    """The same function with a code object of its own, by which torch.compile counts."""
    code = function.__code__.replace()
    return FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


@cache
def inductor_problem() -> str | None:
    """Why torch.compile cannot make CUDA kernels on this machine, None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed or does not know this GPU"
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


@contextmanager
def shapes_only(as_one: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within, tensors have no values (FakeTensorMode): each op takes a body that is one operator where it has such,
    whether or not this machine could run it, else its reference, of which each function is called through
    `as_one(function)`: what is counted is what fused kernels need."""
    for op in OPS.values():
        reference = op.bodies["reference"].run
        functions = reference if isinstance(reference, tuple) else (reference,)
        plain = Body("reference", tuple(map(as_one, functions)))
        op.stand_in = op.bodies.get("cpu") or op.bodies.get("grouped_mm") or plain
    try:
        yield
    finally:
        for op in OPS.values():
            op.stand_in = None


def configure(
    backend: dict[str, str], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Sets the body of some ops on a device type ({"attention": "reference"}); the others are chosen automatically.

    `dtype`: what the model computes in, None if not known. Returns {op: body} of all ops there, for printing.
    ConfigError for an op or body that does not exist or cannot compute on that device (in that dtype).
    """
    device_type = torch.device(device).type
    for name, body_name in backend.items():
        if name not in OPS:
            raise ConfigError(f"ops.backend: there is no op {name!r}, choose from {', '.join(sorted(OPS))}.")
        usable = [body.name for body in OPS[name].bodies.values() if body.unfit(device_type, dtype) is None]
        body = OPS[name].bodies.get(body_name)
        reason = "there is no such body" if body is None else body.unfit(device_type, dtype)
        if reason is not None:
            raise ConfigError(
                f"ops.backend.{name}: {body_name!r} cannot be used on {device_type}: {reason}; "
                f"choose from {', '.join(usable)}."
            )
    for op in OPS.values():
        op.picked.clear()
        op.wanted.pop(device_type, None)
        if op.name in backend:
            op.wanted[device_type] = backend[op.name]
    return chosen(device_type, dtype)


def chosen(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, str]:
    """{op: name of the body} that tensors of this device and dtype (None: any) get, as far as features allow."""
    device_type = torch.device(device).type
    return {name: op.choices(device_type, dtype)[0].name for name, op in sorted(OPS.items())}


def why(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """Why `chosen` names that body of an op."""
    device_type = torch.device(device).type
    op = OPS[name]
    if device_type in op.wanted:
        return "asked for by ops.backend"
    passed = []
    for body in op.bodies.values():
        reason = body.unfit(device_type, dtype)
        if reason is None:
            break
        if body.devices is None or device_type in body.devices:
            passed.append(f"{body.name} ({reason})")
    return f"the next after {', '.join(passed)}" if passed else "the first choice"


def table(device: torch.device | str, dtype: torch.dtype | None = None) -> list[tuple[str, str, str]]:
    """(op, chosen body, the device's other bodies, with the reason where one cannot be used) for printing."""
    device_type = torch.device(device).type
    lines = []
    for name, picked in chosen(device, dtype).items():
        others = []
        for body in OPS[name].bodies.values():
            reason = body.unfit(device_type, dtype)
            if body.name != picked and (body.devices is None or device_type in body.devices):
                others.append(body.name if reason is None else f"{body.name} ({reason})")
        label = f"cpu ({cpu_isa()})" if picked == "cpu" else picked
        lines.append((name, label, ", ".join(others)))
    return lines
