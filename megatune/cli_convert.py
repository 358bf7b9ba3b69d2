"""`megatune convert`: thin, as all verbs are. Everything heavy is imported inside the verb."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Verb = Callable[[Callable[..., int | None]], Callable[..., None]]

_COUNT = click.IntRange(min=1)
_OPTIONS = (
    click.argument("source", metavar="SRC"),
    click.argument("destination", metavar="DST"),
    click.option("--to", required=True, metavar="FORMAT", help="hf, megatune, megatron, torch_dist, peft."),
    click.option("--from", "source_format", metavar="FORMAT", help="Of SRC; default: found out."),
    click.option("--verify", is_flag=True, help="Read DST back and compare every tensor."),
    click.option("--workers", type=_COUNT, help="Processes; default: the cores that may be used."),
    click.option(
        "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of the weights; default: their own."
    ),
    click.option("--no-optimizer", is_flag=True, help="Leave out optimizer states."),
    click.option(
        "--step", type=click.IntRange(min=0), help="Which of several checkpoints; default: the newest."
    ),
    click.option("--like", metavar="FOLDER", help="Model folder whose config and tokenizer belong to SRC."),
    click.option("--adapter", metavar="FOLDER", help="PEFT adapter to merge into the weights."),
    click.option(
        "--tensor", default=1, show_default=True, type=_COUNT, help="Tensor parallel ranks to write for."
    ),
    click.option(
        "--pipeline", default=1, show_default=True, type=_COUNT, help="Pipeline stages to write for."
    ),
    click.option(
        "--virtual", default=1, show_default=True, type=_COUNT, help="Parts of a stage to write for."
    ),
    click.option(
        "--expert", default=1, show_default=True, type=_COUNT, help="Expert parallel ranks to write for."
    ),
    click.option(
        "--vocab-multiple",
        default=128,
        show_default=True,
        type=_COUNT,
        help="Megatron pads the vocabulary to a multiple of this times --tensor.",
    ),
)


def add_verbs(commands: click.Group, verb: Verb) -> None:
    """Put `convert` under `commands`; `verb` turns errors into messages and values into exit codes."""
    command = verb(convert)
    for option in reversed(_OPTIONS):
        command = option(command)
    commands.command("convert")(command)


def convert(
    source: str,
    destination: str,
    to: str,
    source_format: str | None,
    verify: bool,
    workers: int | None,
    dtype: str | None,
    no_optimizer: bool,
    **layout: Any,
) -> None:
    """Convert the checkpoint SRC (its format is found out) to the folder DST in another format, tensor by tensor.

    A conversion that was cut goes on when the same command runs again. DST/megatune-digests.json holds a digest of each
    tensor and what became of it.
    """
    import torch

    from megatune.checkpoint.convert.base import Options
    from megatune.checkpoint.convert.core import convert as run
    from megatune.checkpoint.convert.progress import Progress, show

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    options = Options(dtype=dtypes[dtype], optimizer=not no_optimizer, **layout)
    result = run(
        source,
        destination,
        to,
        options,
        verify=verify,
        workers=workers,
        source_format=source_format,
        progress=Progress(),
    )
    show(result)
