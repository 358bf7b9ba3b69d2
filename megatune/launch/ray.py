"""`launch.backend: ray`: the same agents and ranks as anywhere, on machines that Ray gives.

A placement group of one bundle a rank (a GPU and a core, or a core) says where they are; the first bundle's actor on
each machine starts that machine's agent (launch/agent.py) with as many ranks as there are bundles. This process hands
signals to the agents and shows what they write: rank 0's output, reports. Imports no torch.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatune import __version__
from megatune.config.schema import Config
from megatune.errors import ParallelError
from megatune.launch import codes, wire
from megatune.launch.environment import gpu_count, usable_cores
from megatune.launch.network import reserved_port
from megatune.launch.preflight import check
from megatune.launch.ranks import FORWARDED, in_child

_POLL = 0.2  # seconds
_FAREWELL = 30.0  # seconds that the other agents have to end after node 0's
# What of this process's environment the ranks get; the rest is as their machine has it.
_HANDED_ON = ("CUDA_", "GLOO_", "HF_", "MEGATUNE_", "MKL_", "NCCL_", "OMP_", "TOKENIZERS_", "TORCH")
_NOT_HANDED_ON = ("CUDA_VISIBLE_DEVICES",)


@dataclass(frozen=True)
class Place:
    """Where a bundle is: Ray's id of the machine, its address and name, the GPUs of the bundle, the versions there."""

    node: str
    address: str
    host: str
    gpus: tuple[str, ...]
    megatune: str
    python: str


@dataclass(frozen=True)
class Part:
    """One machine's share: the bundle whose actor starts the agent, the number of ranks, their GPUs."""

    bundle: int
    nproc: int
    gpus: tuple[str, ...]


def run(path: str, overrides: Sequence[str], config: Config) -> int:
    """Run `megatune train` with the configuration at `path` on Ray's machines until it has ended; returns the exit code
    (launch/codes.py). SIGTERM, SIGINT and SIGUSR1 reach every agent. Call it from the main thread.

    Raises ParallelError where Ray is missing or has too little, ConfigError and DataError for other mistakes, all of
    them before a rank starts.
    """
    ray = _ray()
    with _connected(ray, config) as count:
        if check(config, count):
            return 0
        with ExitStack() as stack:
            holders = stack.enter_context(_placed(ray, config, count))
            places = [Place(*place) for place in ray.get([holder.place.remote() for holder in holders])]
            parts = parts_of(places)
            agents = [holders[part.bundle] for part in parts]
            port = ray.get(agents[0].reserve.remote())
            endpoint = f"{places[parts[0].bundle].address}:{port}"
            secret = secrets.token_hex(16)
            for number, (part, holder) in enumerate(zip(parts, agents, strict=True)):
                options = {
                    "--nodes": len(parts),
                    "--node-rank": number,
                    "--nproc": part.nproc,
                    "--endpoint": endpoint,
                    "--run-id": "ray",
                    "--logs": str(Path(config.checkpoint.folder, "logs").absolute()),
                }
                words = [str(word) for option in options.items() for word in option]
                command = ["-m", "megatune", "agent", *words, "--", "train", path, *overrides]
                ray.get(holder.start.remote(command, _environment(part, secret), os.getcwd()))
            return _watch(ray, agents, [places[part.bundle].host for part in parts])


def parts_of(places: Sequence[Place]) -> list[Part]:
    """Each machine's share, in the order of their first bundles. Raises ParallelError where machines do not fit each
    other."""
    by_node: dict[str, list[int]] = {}
    for bundle, place in enumerate(places):
        by_node.setdefault(place.node, []).append(bundle)
        if place.megatune != __version__:
            raise ParallelError(
                f"Ray's worker on {place.host} has megatune {place.megatune or 'not installed'}, this process "
                f"{__version__}; install the same one on all machines of the cluster"
            )
    return [
        Part(bundles[0], len(bundles), tuple(gpu for bundle in bundles for gpu in places[bundle].gpus))
        for bundles in by_node.values()
    ]


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ParallelError(
            "launch.backend: ray needs Ray, which is not installed; pip install ray"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, config: Config) -> Iterator[int]:
    """Connect to the cluster, or start one of this machine; gives the number of ranks."""
    launch = config.launch
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if launch.ray.address == "local":
            raise ConnectionError
        ray.init(address=launch.ray.address, **quiet)
    except ConnectionError as error:
        if launch.ray.address not in ("auto", "local"):
            raise ParallelError(
                f"launch.ray.address: no Ray cluster answers at {launch.ray.address} ({error})"
            ) from error
        # A local cluster has as many cores as ranks are asked for: Ray only counts them.
        wanted = launch.cpu_nproc if launch.nproc == "auto" else launch.nproc
        cores = max(usable_cores(), wanted)
        ray.init(address="local", num_cpus=cores, num_gpus=gpu_count(), include_dashboard=False, **quiet)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        yield (gpus or launch.cpu_nproc) if launch.nproc == "auto" else launch.nproc
    finally:
        ray.shutdown()


@contextmanager
def _placed(ray: Any, config: Config, count: int) -> Iterator[list[Any]]:
    """An actor in each of `count` bundles, of a GPU each where the cluster has any."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    bundle = {"CPU": 1, "GPU": 1} if has_gpus else {"CPU": 1}
    strategy = config.launch.ray.strategy
    group = placement_group([bundle] * count, strategy=strategy)
    try:
        if not group.wait(config.launch.join_timeout):
            free = {name: ray.available_resources().get(name, 0) for name in bundle}
            raise ParallelError(
                f"Ray did not find room for {count} ranks of {bundle} ({strategy}) in "
                f"{config.launch.join_timeout:g} s; free are {free}: lower launch.nproc, change "
                f"launch.ray.strategy, or wait for other jobs"
            )
        holder = ray.remote(Holder)
        yield [
            holder.options(
                num_cpus=1,
                num_gpus=int(has_gpus),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(count)
        ]
    finally:
        remove_placement_group(group)  # ends its actors, and they their agents


def _environment(part: Part, secret: str) -> dict[str, str]:
    handed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_HANDED_ON) and name not in _NOT_HANDED_ON
    }
    return handed | {"CUDA_VISIBLE_DEVICES": ",".join(part.gpus), wire.SECRET: secret}


def _watch(ray: Any, agents: Sequence[Any], hosts: Sequence[str]) -> int:
    """Show what the agents write and hand signals on until they have ended; returns node 0's code."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in FORWARDED
    }
    ended: dict[int, int] = {}
    deadline = float("inf")
    try:
        while len(ended) < len(agents) and time.monotonic() < deadline:
            time.sleep(_POLL)
            numbers = [received.pop(0) for _ in range(len(received))]
            for node, agent in enumerate(agents):
                if node in ended:
                    continue
                try:
                    code, out, err = ray.get(agent.poll.remote(numbers))
                except ray.exceptions.RayError as error:
                    print(f"megatune: Ray lost {hosts[node]}: {str(error).splitlines()[0]}", file=sys.stderr)
                    code, out, err = codes.LOST, b"", b""
                sys.stdout.buffer.write(out)
                sys.stderr.buffer.write(err)
                sys.stdout.flush()
                sys.stderr.flush()
                if code is not None:
                    ended[node] = code
                    if node == 0:
                        deadline = time.monotonic() + _FAREWELL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ended.get(0, codes.LOST)


class Holder:
    """The actor of a bundle."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._agent: subprocess.Popen[bytes] | None = None
        self._read: list[Any] = []

    def place(self) -> tuple[Any, ...]:
        """Fields of `Place`: a plain tuple, so that another megatune can be told from this one."""
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", [])))
        address = ray.util.get_node_ip_address()
        return context.get_node_id(), address, socket.gethostname(), gpus, __version__, sys.executable

    def reserve(self) -> int:
        """A port on this machine that stays free for node 0's agent."""
        return self._stack.enter_context(reserved_port())

    def start(self, command: Sequence[str], variables: Mapping[str, str], folder: str) -> None:
        """Start this machine's agent with this machine's Python. Raises ParallelError where `folder` is not there."""
        if not Path(folder).is_dir():
            raise ParallelError(
                f"{folder} does not exist on {socket.gethostname()}; start megatune in a folder that all machines share"
            )
        own = {
            name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
        }  # Ray sets it to 1
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="megatune-")))
        names = scratch / "out", scratch / "err"
        files = [self._stack.enter_context(name.open("wb")) for name in names]
        self._read = [self._stack.enter_context(name.open("rb")) for name in names]
        self._agent = subprocess.Popen(
            [sys.executable, *command],
            env=own | dict(variables),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            process_group=0,
            preexec_fn=in_child(os.getpid()),
        )

    def poll(self, numbers: Sequence[int]) -> tuple[int | None, bytes, bytes]:
        """Hand these signals to the agent; (its exit code once it has ended, what it wrote since the last call)."""
        code = self._agent.poll()
        if code is None:
            for number in numbers:
                self._agent.send_signal(number)
        out, err = (file.read() for file in self._read)
        return code if code is None else codes.of_status(code), out, err
