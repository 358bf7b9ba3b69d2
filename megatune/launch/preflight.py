"""What is looked at before any worker starts, and the verbs that only print."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatune.config.layout import check_batch, layout_of
from megatune.config.loader import dump_config
from megatune.config.schema import Config
from megatune.errors import ConfigError, DataError, ParallelError
from megatune.launch.local import gpu_count

GIB = 2**30


def local_processes(config: Config) -> int:
    """Processes that `megatune train` starts on this machine.

    Raises ParallelError where more are asked for than there are GPUs.
    """
    gpus = gpu_count()
    if config.launch.nproc == "auto":
        return gpus or config.launch.cpu_nproc
    if gpus and config.launch.nproc > gpus:
        raise ParallelError(
            f"launch.nproc: {config.launch.nproc} processes need that many GPUs; this machine shows {gpus}"
        )
    return config.launch.nproc


def world_size(config: Config) -> int:
    """Processes of the whole run: the launcher's where there is one, else this machine's."""
    return int(os.environ.get("WORLD_SIZE", 0)) or local_processes(config)


def check(config: Config, processes: int) -> bool:
    """Find what would fail later, cheaply and without importing torch. True where the run is already done.

    Raises ConfigError, DataError or ParallelError.
    """
    check_layout(config, processes)
    check_files(config)
    from megatune.training.folder import RunFolder

    folder = RunFolder(config.checkpoint.folder)
    folder.claim(config)
    summary = folder.finished(config)
    if summary is None:
        return False
    print(f"megatune: {folder.path} is done: {summary['step']} steps", end="")
    before, after = summary.get("eval_before"), summary.get("eval_after")
    if after is not None:
        print(
            f", held-out loss {after:.4f}" + (f" ({before:.4f} before)" if before is not None else ""), end=""
        )
    print(f"\n  results: {', '.join(summary['exports'].values()) or folder.path}")
    print(
        f"  talk to it: megatune chat {summary['exports'].get('merged') or summary['exports'].get('model')}"
    )
    print(
        "  to train again, choose another checkpoint.folder or remove this one; to go on, raise train.steps"
    )
    return True


def check_plain(config: Config, processes: int) -> None:
    """What each rank of a torchrun or srun looks at before it imports torch: sizes and files.

    Raises ConfigError, DataError or ParallelError.
    """
    check_batch(config, layout_of(config.parallel, processes))
    check_files(config)


def check_layout(config: Config, processes: int) -> None:
    """The layout against the number of processes and the batch; where it cuts the model, also against the model's
    shape, as far as that is known without loading anything."""
    layout = layout_of(config.parallel, processes)
    check_batch(config, layout)
    plain = {"zero", "replicate", "recompute", "offload", "overlap"}
    asks = (
        config.parallel.model_fields_set - plain
        or config.moe.model_fields_set
        or config.model.quantise
        or config.model.fp8
        or config.optim.name == "adamw_bf16"
    )
    if not asks:
        return  # nothing there that could be wrong
    # What follows imports torch, which takes seconds.
    from megatune.models import family_for
    from megatune.training.layout import check as check_model
    from megatune.training.layout import check_options

    check_options(config, layout)
    described = Path(config.model.path) / "config.json"
    if described.is_file():
        try:
            settings = json.loads(described.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{described}: is not JSON ({error}); restore it") from error
        check_model(config, family_for(settings).spec(settings), processes)


def check_files(config: Config) -> None:
    held_out = config.data.eval or []
    for key, names in (
        ("train", config.data.train),
        ("eval", [held_out] if isinstance(held_out, str) else held_out),
    ):
        for name in names:
            if not Path(name).exists():
                raise DataError(f"data.{key}: {name} does not exist (looked from {Path.cwd()})")
    template = config.data.chat_template
    if template and not Path(template).is_file():
        raise ConfigError(f"data.chat_template: {template} is not a file")


def dry_run(config: Config) -> int:
    """Print the resolved configuration, layout, parameters, memory of one process, and tokens per step."""
    import torch

    from megatune import adapters, checkpoint, models, plan
    from megatune.training.layout import check as check_model
    from megatune.training.layout import describe
    from megatune.training.precision import check_fp8, check_masters, compute_dtype, masters

    processes = world_size(config)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = compute_dtype(config.model.dtype, device)
    check_fp8(config.model.fp8, device)
    check_masters(config, dtype)
    source = checkpoint.resolve_model(config.model.path, config.model.cache)
    layout = check_model(config, source.spec, processes)
    model = models.build(source.spec)
    adapters.attach(model, config.method)
    trainable, total = adapters.describe(model)
    needs = plan.estimate(config, model, source.spec, processes, dtype.itemsize)
    console = Console()
    console.print(dump_config(config), markup=False, highlight=False)
    table = Table("what", "value", title="dry run: nothing was started")
    table.add_row("model", f"{source.spec.family}, {source.spec.num_layers} layers, {total:,} parameters")
    table.add_row("trainable", f"{trainable:,} ({trainable / total:.3%})")
    table.add_row("layout", describe(config, source.spec, layout, device.type))
    table.add_row(
        "dtype", f"compute {str(dtype).removeprefix('torch.')}, masters {masters(config)}, moments float32"
    )
    accumulate = config.train.global_batch_size // check_batch(config, layout)
    table.add_row(
        "tokens per step",
        f"{needs.tokens_per_step:,} ({config.train.global_batch_size} sequences x {config.data.seq_length}; "
        f"{accumulate} micro-batches of {config.train.micro_batch_size} on each process)",
    )
    table.add_section()
    for label, size in needs.rows():
        table.add_row(f"memory: {label}", f"{size / GIB:,.2f} GiB a process")
    console.print(table)
    return 0


def show_data(config: Config, count: int) -> None:
    """Print `count` samples of the training data as the model sees them."""
    from megatune import checkpoint, data
    from megatune.data.tokenizer import load_tokenizer

    check_files(config)
    source = checkpoint.resolve_model(config.model.path, config.model.cache)
    console = Console()
    for text in data.show(config, load_tokenizer(source.path), count):
        console.print(text)
