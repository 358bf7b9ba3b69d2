"""The section `slurm` of the configuration: what a job asks the cluster for, and how it goes on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatune.config.section import Section


class ContainerConfig(Section):
    runtime: Literal["pyxis", "apptainer"] = Field(
        description="pyxis: srun --container-image (enroot). apptainer: apptainer exec, on each node."
    )
    image: str = Field(min_length=1, description="Image: a path, or what the runtime takes instead.")
    mounts: list[str] = Field(
        default_factory=list,
        description="More mounts, SOURCE[:TARGET[:OPTIONS]]; the working directory, the run's folder and the "
        "configuration's are mounted in any case.",
    )
    options: list[str] = Field(
        default_factory=list, description="More arguments for srun (pyxis) or apptainer exec, word by word."
    )


class SlurmConfig(Section):
    nodes: int = Field(1, ge=1, description="Nodes.")
    min_nodes: int | None = Field(
        None, ge=1, description="Start with as few as this many nodes where `nodes` are not free."
    )
    gpus: int | str | None = Field(
        None, description="GPUs of each node: a number, or TYPE:NUMBER. Default: none asked for."
    )
    cpus: int | None = Field(None, ge=1, description="CPUs of each node; default: what the site gives.")
    memory: str | int | None = Field(
        None, description="Memory of each node as sbatch's --mem takes it (500G; 0: all of it)."
    )
    time: str | int | None = Field(
        None, description="Time limit as sbatch takes it: minutes, HH:MM:SS, or D-HH:MM:SS."
    )
    partition: str | None = Field(None, description="Partition.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that the nodes must have.")
    reservation: str | None = Field(None, description="Reservation.")
    nodelist: str | None = Field(None, description="Nodes that must be among those given.")
    exclude: str | None = Field(None, description="Nodes that must not be used.")
    exclusive: bool = Field(False, description="Share the nodes with no other job.")
    mail_user: str | None = Field(None, description="Address that Slurm writes to.")
    mail_type: str | list[str] | None = Field(
        None, description="When it does: END, FAIL, REQUEUE, TIME_LIMIT, ALL ..."
    )
    job_name: str | None = Field(None, description="Default: megatune-<name of checkpoint.folder>.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch by its long name, for example {gres: 'gpu:8', hold: true}.",
    )
    srun_options: list[str] = Field(
        default_factory=list,
        description="More arguments for srun, word by word, for example [--network=sn_all].",
    )
    env: dict[str, str | int | float] = Field(
        default_factory=dict, description="Environment variables of the processes."
    )
    setup: str | None = Field(
        None, description="A bash file that the job sources before it starts (module load ...)."
    )
    python: str | None = Field(
        None,
        description="Python interpreter on the nodes. Default: the one that submits; in a container `python`.",
    )
    container: ContainerConfig | None = Field(None, description="Run inside a container image.")
    grace: Literal["auto"] | Annotated[int, Field(ge=10, le=65000)] = Field(
        "auto",
        description="Seconds before the time limit at which the run is told to save and stop. auto: from the measured "
        "time of its saves, 300 before the first; at most a quarter of `time`.",
    )
    requeue: bool = Field(
        True,
        description="Let the job go back to the queue when it is preempted, at its time limit, or after a fault.",
    )
    retries: int = Field(
        3,
        ge=0,
        description="Give up after more than this many starts in a row that ended without a new checkpoint.",
    )
    exclude_after: int = Field(
        2,
        ge=0,
        description="Keep a requeued job away from a node that was lost in this many of its starts in a row, where the "
        "partition has enough others; 0: never.",
    )
    chain: int = Field(
        1,
        ge=1,
        le=100,
        description="Submit this many jobs, one after the other, each going on where the last one stopped.",
    )

    @field_validator("nodes", "min_nodes", "cpus", "memory", "time", "gpus", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number, not true or false")
        return value

    @field_validator("time")
    @classmethod
    def _time_as_slurm_writes_it(cls, value: str | int | None) -> str | int | None:
        if value is not None and time_limit_seconds(value) is None and str(value).upper() not in _NO_LIMIT:
            raise ValueError(f"{value!r} is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _names_of_variables(cls, value: Any) -> Any:
        for name, what in value.items() if isinstance(value, dict) else ():
            if isinstance(what, bool):
                raise ValueError(
                    f"{name} is a truth value, which no variable holds; write what it should hold in quotes"
                )
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)) or str(name).startswith("SLURM_"):
                raise ValueError(
                    f"{name!r} cannot be set: letters, digits and _ make a name, SLURM_ is Slurm's own"
                )
        return value

    @model_validator(mode="after")
    def _numbers_fit_each_other(self) -> SlurmConfig:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes is {self.min_nodes}, above nodes: {self.nodes}")
        limit = None if self.time is None else time_limit_seconds(self.time)
        if limit is not None and self.grace != "auto" and self.grace >= limit:
            raise ValueError(f"grace is {self.grace} s, but the job lives only {limit} s (time: {self.time})")
        return self


_NO_LIMIT = ("UNLIMITED", "INFINITE")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def time_limit_seconds(value: str | int) -> int | None:
    """Seconds of a time limit as sbatch writes it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None for anything else and for
    no limit."""
    match = _TIME.fullmatch(str(value))
    if match is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
