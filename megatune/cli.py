"""The verbs of the command line; thin: parse, call, print. Everything heavy is imported inside a verb."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from megatune import __version__
from megatune.cli_checkpoint import add_verbs as add_checkpoint_verbs
from megatune.cli_convert import add_verbs as add_convert_verb
from megatune.cli_slurm import add_verbs as add_slurm_verbs
from megatune.errors import MegatuneError

USER_ERROR = 2


def main() -> None:
    """Entry point: `megatune VERB ...`."""
    commands(prog_name="megatune")


def _verb(function: Callable[..., int | None]) -> Callable[..., None]:
    """Print a user's mistake without a traceback and turn the verb's value into the exit code."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from megatune.launch.report import record

        try:
            code = function(*args, **kwargs)
        except MegatuneError as error:
            if not record(error):  # a launcher prints the first rank's error, once
                _let_rank_0_say_it()
                click.echo(f"megatune: {error}", err=True)
            sys.exit(USER_ERROR)
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            if record(error):
                sys.exit(1)
            raise
        sys.exit(code or 0)

    return run


def _let_rank_0_say_it() -> None:
    """torchrun, srun -K and mpirun end the other ranks when rank 0 has ended: what is wrong before torch is even
    there (in the configuration, the number of ranks) is wrong for all of them, and one message is enough."""
    import time

    from megatune.launch.environment import rank_here

    if "torch" not in sys.modules and rank_here():
        time.sleep(2.0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatune")
def commands() -> None:
    """Fine-tune large language models: one YAML file, one checkpoint, one data set, any number of GPUs."""


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print what would be run, and stop.")
@click.option("--nproc", type=click.IntRange(min=1), help="Local processes; the same as launch.nproc=N.")
@_verb
def train(config: str, overrides: tuple[str, ...], dry_run: bool, nproc: int | None) -> int:
    """Fine-tune as CONFIG (a YAML file) says; KEY=VALUE pairs override its keys.

    Alone it starts one process a GPU; under torchrun, srun or mpirun it is one of the processes.
    """
    import os

    from megatune.config import load_config
    from megatune.launch import mpi
    from megatune.launch.local import already_launched, rank_variables, run_local

    if nproc is not None:
        overrides = (*overrides, f"launch.nproc={nproc}")
    if not dry_run and mpi.usable():
        return mpi.run(
            lambda count: _job(load_config(config, overrides), count, ["train", config, *overrides])
        )
    settings = load_config(config, overrides)
    if dry_run:
        from megatune.launch.preflight import dry_run as show

        return show(settings)
    if already_launched():
        from megatune.launch.preflight import check_plain

        os.environ.update(rank_variables())
        check_plain(settings, int(os.environ["WORLD_SIZE"]))
        return _train_here(settings)
    if settings.launch.backend == "ray":
        from megatune.launch.ray import run as run_on_ray

        return run_on_ray(config, overrides, settings)
    from megatune.launch.preflight import check, local_processes

    processes = local_processes(settings)
    if check(settings, processes):
        return 0
    if processes == 1:
        return _train_here(settings)
    from megatune.launch.watch import Limits

    return run_local(
        ["train", config, *overrides],
        processes,
        log_folder=f"{settings.checkpoint.folder}/logs",
        restarts=settings.launch.restarts,
        limits=Limits(settings.launch.hang_timeout, settings.launch.timeout),
    )


def _job(settings: Any, processes: int, argv: list[str]) -> Any:
    """What is the same on all machines of a run, which has been looked at; None where it is done already."""
    from pathlib import Path

    from megatune.launch.agent import Job
    from megatune.launch.preflight import check
    from megatune.launch.watch import Limits

    if check(settings, processes):
        return None
    launch = settings.launch
    return Job(
        command=[sys.executable, "-m", "megatune", *argv],
        nproc=1,
        logs=Path(settings.checkpoint.folder, "logs"),
        restarts=launch.restarts,
        limits=Limits(launch.hang_timeout, launch.timeout),
        join_timeout=launch.join_timeout,
    )


def _train_here(settings: Any) -> int:
    from megatune.launch.rank import is_watched, prepare_rank
    from megatune.training import STOPPED_EXIT_CODE
    from megatune.training.signals import stop_requests

    if is_watched():
        prepare_rank()
    with stop_requests():  # from here on a signal is not lost, though torch takes seconds to load
        from megatune.training import train as run

        return STOPPED_EXIT_CODE if run(settings).stopped else 0


@commands.command(hidden=True)
@click.option("--nodes", required=True, type=click.IntRange(min=1), help="Nodes of the job.")
@click.option("--node-rank", required=True, type=click.IntRange(min=0), help="Which of them this is.")
@click.option("--nproc", required=True, type=click.IntRange(min=1), help="Ranks of this node.")
@click.option("--endpoint", required=True, metavar="HOST:PORT", help="Where node 0's agent listens.")
@click.option("--run-id", required=True, help="The same for all agents of one job.")
@click.option("--generation", default=0, show_default=True, type=click.IntRange(min=0), help="Of this start.")
@click.option("--logs", required=True, type=click.Path(file_okay=False), help="Folder for gen-<G>/.")
@click.argument("words", nargs=-1, required=True, metavar="-- train CONFIG [KEY=VALUE]...")
@_verb
def agent(words: tuple[str, ...], **options: Any) -> int:
    """Start and watch one node's ranks; one agent a node, started by a scheduler. MEGATUNE_SECRET: a random text, the
    same for all agents of the job."""
    from megatune.launch.rank import run_agent

    return run_agent(words, **options)


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--mesh", required=True, help="The layout, for example tp8-pp16-dp80 or tp4-pp16-dp160-ep32.")
@click.option(
    "--role",
    type=click.Choice(["first", "middle", "last", "all"]),
    default="all",
    show_default=True,
    help="Which pipeline rank to plan for.",
)
@_verb
def plan(config: str, overrides: tuple[str, ...], mesh: str, role: str) -> int:
    """Run one step of single processes of a layout of any size here, without its GPUs, weights or data, and print
    what each holds and sends.

    MESH sets the sizes in the `parallel` section of CONFIG; its other options stay. `model.path` may be a folder with
    nothing but a config.json.
    """
    from megatune.config import load_config

    settings = load_config(config, overrides)
    from megatune.plan.show import show_plan

    return show_plan(settings, mesh, None if role == "all" else role)


@commands.command()
@click.argument("model")
@click.option("--prompt", "-p", help="The user's message; default: standard input.")
@click.option("--raw", is_flag=True, help="Continue the text itself, without the chat template.")
@click.option("--system", help="System message.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0.0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0.0, 1.0, min_open=True))
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@_verb
def generate(model: str, prompt: str | None, raw: bool, system: str | None, **options: Any) -> None:
    """Answer one prompt with MODEL: a Hugging Face folder, a GGUF file or a PEFT adapter folder."""
    from megatune.serve.chat import answer

    text = sys.stdin.read() if prompt is None else prompt
    answer(model, text, raw=raw, system=system, **options)


@commands.command()
@click.argument("model")
@click.option("--system", help="System message.")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(min=0.0))
@click.option("--top-p", default=0.95, show_default=True, type=click.FloatRange(0.0, 1.0, min_open=True))
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@_verb
def chat(model: str, system: str | None, **options: Any) -> None:
    """Talk with MODEL in the terminal; an empty line or Ctrl-D ends it."""
    from megatune.serve.chat import converse

    converse(model, system=system, **options)


@commands.group()
def data() -> None:
    """Look at training data."""


@data.command("show")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--count", "-n", default=3, show_default=True, type=click.IntRange(min=1))
@_verb
def data_show(config: str, overrides: tuple[str, ...], count: int) -> None:
    """Print the first samples as the model sees them, tokens with loss coloured."""
    from megatune.config import load_config
    from megatune.launch.preflight import show_data

    show_data(load_config(config, overrides), count)


@commands.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--nproc", type=click.IntRange(min=1), help="Local processes; default: as many as train starts."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings and all that was measured as JSON.")
@_verb
def doctor(config: str | None, overrides: tuple[str, ...], nproc: int | None, as_json: bool) -> int:
    """Look for what would spoil a long run of CONFIG here, or on all nodes under srun, mpirun or torchrun: GPUs,
    versions, network, clocks, storage, limits, memory. Exit code 0: go; 2: no go, with reasons."""
    from megatune.launch.doctor_start import start

    return start(config, overrides, nproc, as_json)


@commands.command()
@_verb
def env() -> None:
    """Print versions, devices, compiled parts, and which body serves each op."""
    from megatune.launch.show_environment import show_environment

    show_environment()


add_slurm_verbs(commands, _verb)
add_convert_verb(commands, _verb)
add_checkpoint_verbs(commands, _verb)
