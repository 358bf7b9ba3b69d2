"""`megatune inspect`, `diff` and `average`: thin, as all verbs are. Everything heavy is imported inside the verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Verb = Callable[[Callable[..., int | None]], Callable[..., None]]

DIFFERENT = 1
_DTYPES = click.Choice(["bf16", "fp16", "fp32"])
_LIKE = click.option("--like", metavar="FOLDER", help="Model folder whose config belongs to what has none.")
_STEP = click.option(
    "--step", type=click.IntRange(min=0), help="Which of several steps; default: the newest."
)


def add_verbs(commands: click.Group, verb: Verb) -> None:
    """Put the verbs under `commands`; `verb` turns errors into messages and values into exit codes."""
    for name, function, options in (
        ("inspect", inspect, _INSPECT),
        ("diff", diff, _DIFF),
        ("average", average, _AVERAGE),
    ):
        command = verb(function)
        for option in reversed(options):
            command = option(command)
        commands.command(name)(command)


_INSPECT = (
    click.argument("path"),
    click.option("--full", is_flag=True, help="Read every byte, and check it where there are checksums."),
    click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON."),
    _LIKE,
    _STEP,
)


def inspect(path: str, full: bool, as_json: bool, like: str | None, step: int | None) -> int:
    """Say what the checkpoint PATH is: format, layout it was written in, step, dtypes, sizes, and whether it is whole.

    Exit code 0: whole; 1: something is wrong with it; 2: no checkpoint.
    """
    from megatune.checkpoint.convert.base import Options
    from megatune.checkpoint.convert.inspect import inspect as look
    from megatune.checkpoint.convert.inspect import show, to_json

    facts = look(Path(path), Options(like=like, step=step), full=full)
    if as_json:
        print(to_json(facts))
    else:
        show(facts)
    return 0 if facts.wrong is None and not facts.infinite else 1


_DIFF = (
    click.argument("first"),
    click.argument("second"),
    click.option("--no-optimizer", is_flag=True, help="Compare weights only."),
    click.option(
        "--all", "everything", is_flag=True, help="Print every tensor that differs, not the first 40."
    ),
    _LIKE,
)


def diff(first: str, second: str, no_optimizer: bool, everything: bool, like: str | None) -> int:
    """Say which tensors of two checkpoints differ and by how much; their formats may be any two.

    Optimizer states are compared where both have them. Exit code 0: equal; 1: different; 2: one cannot be read.
    """
    from megatune.checkpoint.convert.base import Options
    from megatune.checkpoint.convert.compare import check_paths, compare, open_whole, show

    paths = [Path(first), Path(second)]
    check_paths(paths)
    a, b = (open_whole(path, Options(like=like)) for path in paths)
    found = show(compare(a, b, optimizer=not no_optimizer), limit=10**9 if everything else 40)
    return DIFFERENT if found else 0


_AVERAGE = (
    click.argument("paths", nargs=-1, required=True, metavar="CHECKPOINT..."),
    click.option("--output", "-o", required=True, metavar="FOLDER", help="Hugging Face folder to write."),
    click.option(
        "--weights", metavar="W,W,...", help="One for each checkpoint, scaled to sum to 1; default: equal."
    ),
    click.option(
        "--ema", type=float, metavar="DECAY", help="Exponential moving average, oldest checkpoint first."
    ),
    click.option("--dtype", type=_DTYPES, help="Of the weights; default: the first checkpoint's."),
    _LIKE,
)


def average(
    paths: tuple[str, ...],
    output: str,
    weights: str | None,
    ema: float | None,
    dtype: str | None,
    like: str | None,
) -> None:
    """Write the mean of the weights of several checkpoints of one model to a Hugging Face folder."""
    import torch

    from megatune.checkpoint.convert import average as library
    from megatune.checkpoint.convert.base import Options
    from megatune.checkpoint.convert.compare import check_paths
    from megatune.errors import ConfigError

    if weights is not None and ema is not None:
        raise ConfigError("--weights and --ema: give one of them")
    try:
        given = [float(one) for one in weights.split(",")] if weights is not None else None
    except ValueError:
        raise ConfigError(f"--weights {weights}: must be numbers with commas between them") from None
    shares = library.mean_weights(len(paths), given) if ema is None else library.ema_weights(len(paths), ema)
    dtypes: dict[Any, Any] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = [Path(path) for path in paths]
    check_paths(found)
    made = library.average(
        found, Path(output), shares, Options(dtype=dtypes.get(dtype), like=like, optimizer=False)
    )
    print(f"wrote {output}: the mean of {len(paths)} checkpoints, {len(made.weights.names())} tensors")
