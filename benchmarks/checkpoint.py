"""Saving and loading a full training state against the disk's own rate, plain DCP and transformers.

    python benchmarks/checkpoint.py [--shape 0.3b|1b|8b] [--gpu] [--folder DIR] [--parts save,load,waited]
                                    [--rivals dcp,transformers] [--repeats 3] [--out FILE]
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --shape 8b --gpu

The state is that of full tuning: fp32 masters and two moments of a Llama of that shape (12 bytes a parameter), sharded
over the processes as ZeRO does. Measured in one run, of the slowest process:

- `call_seconds`: what a step waits for a save whose copy is hidden behind the next forward and backward;
  `stall_seconds`: call and copy, with nothing to hide it behind; `memory_made_seconds`: once a run, beside the first
  steps. `save_seconds`: until the checkpoint is there, read back; `save_waited_seconds`: a save without a copy.
- `load_cold_seconds`, `load_warm_seconds`: files out of the page cache (posix_fadvise), or just read.
- shares: of what plain writes with a final sync, or plain reads by four threads, reach in the same folder before.

`dcp`: torch.distributed.checkpoint's async_save, save and load of the same bytes. `transformers`: save_pretrained and
from_pretrained of the bf16 weights alone. The disk must hold the state once, host memory twice where `dcp` runs; 8b is
96 GB on one process, 48 GB on each of two. `--parts copy`: only the stall, and nothing is written. Conversions are
measured by benchmarks/convert.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, device_name, drop_cached, synchronize
from megatune import checkpoint, models, parallel
from megatune.config.schema import ParallelConfig
from megatune.parallel.shard import Parts, ShardSpec, parts_of_flat

# Hidden size, MLP size, layers, heads, KV heads, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (128, 256, 2, 4, 2, 1000, True),
    "0.3b": (1024, 2816, 16, 16, 8, 64000, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
SLOTS = ("model", "optim/exp_avg", "optim/exp_avg_sq")
BLOCK = 16 * 2**20


def hf_config(shape: str) -> dict[str, Any]:
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }


def make_state(shape: str, world: parallel.World) -> dict[str, Parts]:
    """Masters and moments as ZeRO shards them: of each tensor, flattened, one piece a process, with random bits."""
    config = hf_config(shape)
    specs = models.build(models.family_for(config).spec(config)).shard_specs()
    generator = torch.Generator(world.device).manual_seed(world.rank)
    state = {}
    for slot in SLOTS:
        for name, spec in specs.items():
            state[f"{slot}/{name}"] = _shard(spec, world, generator)
    return state


def _shard(spec: ShardSpec, world: parallel.World, generator: torch.Generator) -> Parts:
    count = math.prod(spec.shape)
    share = -(-count // world.world_size)
    start = min(world.rank * share, count)
    # Noise that no compression of disk or file system makes small.
    flat = torch.randn(min(share, count - start), device=world.device, generator=generator)
    return parts_of_flat(spec, world.cut, flat, start, True)


def tensors_of(state: dict[str, Parts]) -> list[torch.Tensor]:
    return [tensor for parts in state.values() for _, tensor in parts.parts]


class Clock:
    """Seconds of the slowest process."""

    def __init__(self, world: parallel.World) -> None:
        self.world = world

    def __call__(self, work: Callable[[], Any]) -> float:
        synchronize()
        self.world.barrier()
        began = time.perf_counter()
        work()
        synchronize()
        return self.world.max([time.perf_counter() - began])[0]


@contextmanager
def emptied(folder: Path, world: parallel.World) -> Iterator[Path]:
    """A folder that is there for a while."""
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    world.barrier()
    yield folder
    world.barrier()
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()


def disk_rates(folder: Path, size: int, clock: Clock) -> dict[str, float]:
    """bytes/s of all processes together: plain writes with a sync at the end, and reads by four threads, as large as
    the state, from the disk and from the page cache."""
    from concurrent.futures import ThreadPoolExecutor

    path = folder / f"plain-{clock.world.rank}"
    block = memoryview(torch.randint(0, 255, (BLOCK,), dtype=torch.uint8).numpy())
    mine = size // clock.world.world_size // BLOCK * BLOCK or BLOCK
    buffers = [bytearray(BLOCK) for _ in range(4)]

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for _ in range(0, mine, BLOCK):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.close(descriptor)

    def read() -> None:
        def some(number: int) -> None:
            descriptor = os.open(path, os.O_RDONLY)
            for start in range(number * BLOCK, mine, 4 * BLOCK):
                os.preadv(descriptor, [buffers[number]], start)
            os.close(descriptor)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(some, range(4)))

    total = mine * clock.world.world_size
    found = {"write": total / clock(write)}
    clock(lambda: drop_cached(folder))
    found["read_cold"] = total / clock(read)
    found["read_warm"] = total / clock(read)
    clock.world.barrier()
    return found


def ours(
    state: dict[str, Parts], folder: Path, repeats: int, parts: list[str], clock: Clock
) -> dict[str, Any]:
    """Stalls, background and load times of a `checkpoint.Saver`."""
    world, live = clock.world, tensors_of(state)
    saver = checkpoint.Saver(folder, state, world)
    staging = saver._staging
    row: dict[str, Any] = {"memory_made_seconds": clock(staging.allocate), "copies": not staging.is_direct}
    if "copy" in parts:
        stalls = [clock(lambda: staging.copy(staging.now())) for _ in range(repeats)]
        return {**row, "stall_seconds": statistics.median(stalls), "stall_seconds_max": max(stalls)}
    stalls, calls, seconds = [], [], []
    for step in range(1, repeats + 1):
        pending: list[checkpoint.PendingSave] = []
        _remove_steps(folder, world)
        calls.append(clock(lambda step=step, pending=pending: pending.append(saver.save(step, {}))))
        stalls.append(calls[-1] + clock(pending[0].wait_staged))
        clock(pending[0].wait)
        seconds.append(world.max([pending[0].seconds])[0])
    row["call_seconds"] = statistics.median(calls)
    row |= {"stall_seconds": statistics.median(stalls), "stall_seconds_max": max(stalls)}
    row["save_seconds"] = statistics.median(seconds)
    if "load" in parts:
        row |= _load_seconds(lambda: checkpoint.load(pending[0].folder, state), live, folder, clock)
    if "waited" in parts:
        _remove_steps(folder, world)
        row["save_waited_seconds"] = clock(lambda: saver.save(repeats + 1, {}, background=False))
    return row


def _remove_steps(folder: Path, world: parallel.World) -> None:
    """The disk need not hold two."""
    if world.is_main:
        for path in checkpoint.steps(folder):
            shutil.rmtree(path)
    world.barrier()


def _load_seconds(
    load: Callable[[], Any], live: list[torch.Tensor], folder: Path, clock: Clock
) -> dict[str, float]:
    """Cold and warm; what was loaded must be what was there."""
    wanted = [tensor.reshape(-1)[:1].clone() for tensor in live]
    for tensor in live:
        tensor.zero_()
    clock(lambda: drop_cached(folder) if clock.world.is_main else None)
    found = {"load_cold_seconds": clock(load)}
    found["load_warm_seconds"] = min(clock(load) for _ in range(2))
    assert all(torch.equal(tensor.reshape(-1)[:1], was) for tensor, was in zip(live, wanted, strict=True))
    return found


def dcp(state: dict[str, Parts], folder: Path, repeats: int, clock: Clock) -> dict[str, Any]:
    """The same bytes with torch.distributed.checkpoint, as DTensors where there are several processes."""
    import torch.distributed.checkpoint as plain

    tensors = _as_dcp(state, clock.world)
    live = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors.values()]
    stalls, seconds, last = [], [], folder / "last"
    for _ in range(repeats):
        with emptied(folder / "async", clock.world) as target:
            futures: list[Any] = []
            stalls.append(
                clock(
                    lambda futures=futures, target=target: futures.append(
                        plain.async_save(tensors, checkpoint_id=str(target))
                    )
                )
            )
            seconds.append(stalls[-1] + clock(futures[0].result))
    row = {"stall_seconds": statistics.median(stalls), "stall_seconds_max": max(stalls)}
    row["save_seconds"] = statistics.median(seconds)
    row["save_waited_seconds"] = clock(lambda: plain.save(tensors, checkpoint_id=str(last)))
    row |= _load_seconds(lambda: plain.load(tensors, checkpoint_id=str(last)), live, last, clock)
    row["note"] = "async_save and save neither sync nor checksum nor read back what they write"
    return row


def _as_dcp(state: dict[str, Parts], world: parallel.World) -> dict[str, Any]:
    """Each piece of memory once, flat: what DCP gets of a model under fully_shard, with one chunk a process."""
    if world.world_size == 1:
        return {name: parts.parts[0][1] for name, parts in state.items()}
    from torch.distributed.tensor import DTensor, Shard

    mesh = world.fsdp_mesh()
    found = {}
    for name, parts in state.items():
        flat = torch.cat([tensor.reshape(-1) for _, tensor in parts.parts]) if parts.parts else None
        count = math.prod(parts.shape)
        if flat is None:
            flat = torch.empty(0, device=world.device)
        found[name] = DTensor.from_local(
            flat, mesh, [Shard(0)], run_check=False, shape=torch.Size([count]), stride=(1,)
        )
    return found


def pretrained(shape: str, folder: Path, repeats: int, clock: Clock) -> dict[str, Any]:
    """transformers, one process: the bf16 weights alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = ("architectures", "model_type")
    config = LlamaConfig(**{key: value for key, value in hf_config(shape).items() if key not in keys})
    with torch.device(clock.world.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    save = partial(model.save_pretrained, folder)
    seconds = [clock(save) for _ in range(repeats)]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    del model, save
    gc.collect()

    def load() -> None:
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(clock.world.device)

    drop_cached(folder)
    cold = clock(load)
    return {
        "bytes": size,
        "save_waited_seconds": statistics.median(seconds),
        "load_cold_seconds": cold,
        "load_warm_seconds": min(clock(load) for _ in range(2)),
        "note": "bf16 weights alone; save_pretrained does not sync",
    }


def with_shares(name: str, row: dict[str, Any], size: int, rates: dict[str, float]) -> dict[str, Any]:
    """Seconds, and what share of the disk's own rate they are. A save of ours also reads all of it back."""
    size = row.get("bytes", size)
    for key, rate in (
        ("save_seconds", "write"),
        ("save_waited_seconds", "write"),
        ("load_cold_seconds", "read_cold"),
        ("load_warm_seconds", "read_warm"),
    ):
        if key in row:
            row[key.replace("_seconds", "_share")] = size / row[key] / rates[rate]
    if name == "megatune" and "save_seconds" in row:
        least = size / rates["write"] + size / rates["read_cold"]
        row["save_share_of_write_and_read"] = least / row["save_seconds"]
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    return {"name": name, "gigabytes": round(size / 1e9, 3), **rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.3b")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--folder", default="runs/benchmark-checkpoint")
    parser.add_argument("--parts", default="save,load,waited")
    parser.add_argument("--rivals", default="dcp,transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    world = parallel.init(ParallelConfig(zero=1), device="cuda" if options.gpu else "cpu")
    clock, folder, rivals = Clock(world), Path(options.folder), options.rivals.split(",")
    state = make_state(options.shape, world)
    (size,) = (int(value) for value in world.sum([float(checkpoint.written_bytes(state))]))
    free = shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
    if options.parts != "copy" and free < 1.05 * size:
        raise SystemExit(
            f"{folder}: {size / 1e9:.0f} GB are written and {free / 1e9:.0f} GB free: choose another --folder"
        )
    with emptied(folder / "plain", world) as plain:
        rates = disk_rates(plain, min(size, 16 * 10**9), clock)
    rows = []
    with emptied(folder / "ours", world) as target:
        rows.append(
            with_shares(
                "megatune", ours(state, target, options.repeats, options.parts.split(","), clock), size, rates
            )
        )
    if "dcp" in rivals:
        gc.collect()
        with emptied(folder / "dcp", world) as target:
            rows.append(with_shares("torch DCP", dcp(state, target, options.repeats, clock), size, rates))
    del state
    gc.collect()
    if "transformers" in rivals and world.world_size == 1:
        with emptied(folder / "transformers", world) as target:
            row = pretrained(options.shape, target, options.repeats, clock)
            rows.append(with_shares("transformers", row, size, rates))
    if world.is_main:
        _report(options, world, rates, rows)
    world.barrier()
    world.close()


def _report(options: argparse.Namespace, world: parallel.World, rates: dict[str, float], rows: list) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if key != "note"))
    content = {
        "benchmark": "checkpoint",
        "device": device_name() if options.gpu else f"{os.cpu_count()} cores, {device_name()}",
        "torch": torch.__version__,
        "shape": options.shape,
        "processes": world.world_size,
        "disk_gigabytes_per_second": {key: round(value / 1e9, 3) for key, value in rates.items()},
        "rows": rows,
    }
    where = "gpu" if options.gpu else "cpu"
    path = Path(options.out) if options.out else RESULTS / f"checkpoint_{options.shape}_{where}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["disk_gigabytes_per_second"]), f"-> {path}")


if __name__ == "__main__":
    main()
