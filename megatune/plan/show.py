"""`megatune plan`: what each kind of process of a layout holds and sends, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatune.config.layout import layout_of
from megatune.config.schema import Config
from megatune.models import count_parameters
from megatune.parallel.stages import Stage
from megatune.plan.dry_run import Report, dry_run
from megatune.plan.mesh import Mesh, Role, rank_of, roles
from megatune.plan.shapes import shape_of
from megatune.training.layout import describe

GIB = 2**30
_STATE = {
    "weights": "weights",
    "masters": "masters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations and buffers, at most",
    "peak": "together, at most",
}


def show_plan(config: Config, mesh: str, role: Role | None = None) -> int:
    """Print the layout and a column for each role (default: all that differ). Raises ParallelError or ConfigError where
    the model, the batch or the options do not fit it."""
    layout_given = Mesh.parse(mesh)
    config = layout_given.apply(config)
    layout = layout_of(config.parallel, layout_given.world_size)
    chosen = roles(layout) if role is None else (role,)
    ranks = [rank_of(one, layout) for one in chosen]
    spec = shape_of(config.model.path)
    reports = [dry_run(config, spec, layout.world_size, rank) for rank in ranks]
    console = Console()
    console.print(describe(config, spec, layout, "processes"), markup=False, highlight=False)
    table = Table(
        "one process",
        *(f"{one} (rank {report.rank})" for one, report in zip(chosen, reports, strict=True)),
        title=f"{config.model.path}: {count_parameters(spec):,} parameters on {layout.world_size:,} processes",
    )
    for label, values in rows(reports):
        table.add_row(label, *values)
    console.print(table)
    console.print(
        f"planned in {sum(report.seconds for report in reports):.0f} s with the code of the run itself; sizes without "
        "what the device's libraries and its allocator need",
        highlight=False,
    )
    return 0


def rows(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """(label, a value for each report) of the table."""
    found = [
        ("stages", [" and ".join(map(_stage, report.stages)) for report in reports]),
        ("micro-batches a step", [str(report.micro_batches) for report in reports]),
        ("parameters held", [f"{report.parameters:,}" for report in reports]),
        ("  trained", [f"{report.trainable:,}" for report in reports]),
    ]
    for name, label in _STATE.items():
        found.append((f"memory: {label}", [_size(getattr(report, name)) for report in reports]))
    for axis in dict.fromkeys(axis for report in reports for axis in report.sent):
        sizes = [
            f"{_size(report.sent.get(axis, 0))} in {report.calls.get(axis, 0):,}"
            if axis in report.sent
            else "-"
            for report in reports
        ]
        found.append((f"sent a step over {axis}", sizes))
    return found


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:,.2f} MiB"


def _stage(stage: Stage) -> str:
    first, last = stage.layers.start, stage.layers.stop - 1
    layers = [f"layers {first}-{last}"] if stage.layers else []
    return " + ".join(["embedding"] * stage.is_first + layers + ["head"] * stage.is_last)
