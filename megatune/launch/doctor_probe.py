"""What `megatune doctor` measures on one machine: versions, GPUs, limits, the run's folder, what the run will take."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil
import torch

from megatune import __version__
from megatune.config.schema import Config
from megatune.errors import MegatuneError
from megatune.launch import preflight
from megatune.launch.doctor_checks import Gpu, Needs, Node, Storage

_BLOCK = 4 * 2**20
_WRITTEN = 64 * 2**20  # by each node
_SYNCS = 10
_SEE = 10.0  # seconds in which a file must be seen on the other nodes
_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")
_MATRIX, _PRODUCTS = 8192, 20
_QUERY = "name,driver_version,memory.total,memory.free,ecc.errors.uncorrected.volatile.total"


def look_at_node(host: str, ranks: int, config: Config | None) -> Node:
    """What this machine says of itself. `ranks`: how many run here."""
    driver, gpus = _gpus()
    versions = {
        "megatune": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "",
        "driver": driver,
    }
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Node(
        host=host,
        ranks=ranks,
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().total,
        versions=versions,
        gpus=gpus,
        torch_gpus=torch.cuda.device_count(),
        driver_cuda=_driver_cuda(),
        open_files=files,
        locked_memory=locked,
        shared_memory=shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else 0,
        infiniband=len(list(_INFINIBAND.iterdir())) if _INFINIBAND.is_dir() else 0,
        own_address=_own_address(),
        mistakes=_mistakes_here(config) if config is not None else (),
    )


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _mistakes_here(config: Config) -> list[str]:
    """What in the configuration this machine does not have."""
    found = []
    try:
        preflight.check_files(config)
    except MegatuneError as error:
        found.append(str(error))
    if os.sep in config.model.path and not Path(config.model.path).exists():
        found.append(f"model.path: {config.model.path} does not exist")
    return found


def _gpus() -> tuple[str, list[Gpu]]:
    """(driver's version, GPUs) as nvidia-smi tells; ("", []) where there is none."""
    tool = shutil.which("nvidia-smi")
    if not tool or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "", []
    command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "", []
    driver, gpus = read_gpus(listed.stdout if listed.returncode == 0 else "")
    return driver, shown(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def shown(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """Those of a machine's GPUs that CUDA_VISIBLE_DEVICES leaves; by number, or, of identifiers, as many."""
    if visible is None:
        return list(gpus)
    names = [name.strip() for name in visible.split(",")]
    if all(name.isdecimal() for name in names):
        return [gpus[int(name)] for name in names if int(name) < len(gpus)]
    return list(gpus[: len(names)])


def read_gpus(text: str) -> tuple[str, list[Gpu]]:
    """(driver's version, GPUs) out of nvidia-smi's lines, see _QUERY; memory there is in MiB."""
    driver, gpus = "", []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5 or not parts[2].isdecimal() or not parts[3].isdecimal():
            continue
        driver = parts[1]
        errors = int(parts[4]) if parts[4].isdecimal() else None
        gpus.append(Gpu(parts[0], int(parts[2]) * 2**20, int(parts[3]) * 2**20, errors))
    return driver, gpus


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def compute_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products on this rank's GPU."""
    a = torch.randn(_MATRIX, _MATRIX, device=device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    for _ in range(5):
        a @ b
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(_PRODUCTS):
        a @ b
    torch.cuda.synchronize(device)
    return 2 * _MATRIX**3 * _PRODUCTS / (time.perf_counter() - began)


class RunFolder:
    """A hidden folder in checkpoint.folder that this look writes to, and removes with all that it made."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder = Path(folder).absolute()
        self.probe = self.folder / f".doctor-{name}"
        self._made: list[Path] = []

    def open(self) -> str:
        """Make it (the first node does); returns what is wrong, if anything."""
        try:
            for path in (*reversed(self.probe.parents), self.probe):
                if not path.exists():
                    path.mkdir()
                    self._made.append(path)
            _replace(self.probe / "token", self.probe.name)
        except OSError as error:
            return f"cannot be written ({error.strerror})"
        return ""

    def measure(self, host: str, wait: float = _SEE) -> Storage:
        """What this node finds there."""
        seen = self._seen(wait)
        if seen is None:
            return Storage(host, seen=None)
        mine = self.probe / host
        try:
            mine.mkdir()
            seconds = _write(mine / "block", _WRITTEN)
            sync = median(_small(mine / "small", number) for number in range(_SYNCS))
            _rename(mine)
        except OSError as error:
            return Storage(host, f"{error.strerror or error} ({Path(error.filename or '').name or 'write'})")
        return Storage(host, "", _WRITTEN, seconds, sync, seen)

    def _seen(self, wait: float) -> float | None:
        began = time.monotonic()
        while self._token() != self.probe.name:
            if time.monotonic() - began > wait:
                return None
            time.sleep(0.1)
        return time.monotonic() - began

    def _token(self) -> str:
        try:
            return (self.probe / "token").read_text()
        except OSError:  # not there yet: a network file system keeps what it knew for some seconds
            return ""

    def free(self) -> int:
        """Bytes that the run may still write there."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(there).free

    def close(self) -> None:
        """Remove what `open` and `measure` made; folders that hold something else by now stay."""
        shutil.rmtree(self.probe, ignore_errors=True)
        for path in reversed(self._made):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _write(path: Path, size: int) -> float:
    """Seconds until a file of `size` random bytes is on disk."""
    block = os.urandom(_BLOCK)
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _small(path: Path, number: int) -> float:
    """Seconds until a small file has been replaced, on disk."""
    began = time.perf_counter()
    _replace(path, f"{number}")
    return time.perf_counter() - began


def _replace(path: Path, text: str) -> None:
    """As checkpoints are published: written beside, synced, renamed over what is there."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rename(folder: Path) -> None:
    """Whether names move in one step: a file over another, and a folder with what is in it."""
    _replace(folder / "file", "old")
    _replace(folder / "file", "new")
    (folder / ".unfinished").mkdir()
    (folder / ".unfinished" / "inside").write_text("whole")
    os.rename(folder / ".unfinished", folder / "finished")
    whole = (folder / "file").read_text() == "new" and (folder / "finished" / "inside").read_text() == "whole"
    if not whole or (folder / ".unfinished").exists():
        raise OSError(0, "renaming left old and new names behind: this file system's rename is not atomic")


def needs_of(config: Config, processes: int, device: torch.device) -> Needs:
    """What the run will take. Raises a MegatuneError where configuration, model and layout do not fit each other.

    Nothing is loaded: shapes come from the model's config.json (a GGUF file or a hub name is fetched first).
    """
    from megatune import adapters, models, optim, plan
    from megatune.parallel.units import is_base_matrix
    from megatune.training.layout import check as check_model
    from megatune.training.precision import compute_dtype

    preflight.check_layout(config, processes)
    spec = _spec(config)
    check_model(config, spec, processes)
    model = models.build(spec)
    adapters.attach(model, config.method)
    dtype = compute_dtype(config.model.dtype, device)
    specs, state_width = model.shard_specs(), optim.state_width(config.optim)
    low = optim.master_dtype(config.optim, dtype).itemsize
    one = 0  # bytes of a checkpoint: masters and what the optimizer keeps of them
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            master = low if is_base_matrix(specs[name]) else 4
            one += int(parameter.numel() * (master + state_width(specs[name])))
    folder = Path(config.checkpoint.folder)
    saves = config.checkpoint
    kept = 1
    if saves.every:
        kept = saves.keep_last + saves.keep_best + 1  # the new one is there before an old one goes
        # With epochs the number of steps is known only when the data is.
        kept += (config.train.steps or 0) // saves.keep_every if saves.keep_every else 0
    # What lies there already is replaced as the run goes on.
    there = min(len(list((folder / "checkpoints").glob("step-*"))), kept - 1)
    whole = [
        what for what in config.checkpoint.export or [] if what != "adapter" and not (folder / what).exists()
    ]
    exported = models.count_parameters(spec) * dtype.itemsize * len(whole)
    process = plan.estimate(config, model, spec, processes, dtype.itemsize).total
    return Needs(processes, one, one * (kept - there) + exported, process)


def _spec(config: Config):
    """Shape of the model, without its weights where that can be."""
    from megatune import checkpoint
    from megatune.models import family_for

    described = Path(config.model.path) / "config.json"
    if described.is_file():
        settings = json.loads(described.read_text("utf-8"))
        return family_for(settings).spec(settings)
    return checkpoint.resolve_model(config.model.path, config.model.cache).spec
