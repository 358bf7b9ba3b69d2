#!/usr/bin/env python3
"""Write the tables of docs/parallelism.md: `tools/make_parallel_docs.py [FILE]`.

What is tested comes from the runs of tests/parallel/test_parity.py (`tests/helpers/layouts.py`), what is refused from
the checks that a run itself makes (`config.load_config`, `training.layout.check`). A combination that is neither, or
both, is an error.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatune.config import load_config  # noqa: E402
from megatune.config.layout import Layout, layout_of  # noqa: E402
from megatune.config.schema import Config  # noqa: E402
from megatune.errors import MegatuneError  # noqa: E402
from megatune.models import family_for  # noqa: E402
from megatune.models.spec import DecoderSpec  # noqa: E402
from megatune.training.layout import check  # noqa: E402
from tests.helpers.layouts import Run, runs_of  # noqa: E402
from tests.helpers.parity import FAMILIES, Case, config_of  # noqa: E402

BEGIN = "<!-- matrix: made by tools/make_parallel_docs.py (make docs) -->"
END = "<!-- end of matrix -->"
METHODS = {
    "full": ("method.type=full",),
    "freeze": ("method.type=freeze", "method.last_layers=2"),
    "lora": ("method.type=lora",),
}
# Schedule -> an uneven way to deal the four layers of the models that are tested to two ranks.
SCHEDULES = {
    "none": [4],
    "gpipe": [3, 1],
    "1f1b": [3, 1],
    "interleaved": [2, 0, 1, 1],
    "zb-h1": [3, 1],
    "zbv": [2, 0, 1, 1],
}


@dataclass(frozen=True)
class Seen:
    """A run and what follows from its settings."""

    run: Run
    config: Config
    layout: Layout
    spec: DecoderSpec

    @property
    def schedule(self) -> str:
        return self.config.parallel.schedule if self.layout.pp > 1 else "none"


@dataclass(frozen=True)
class Row:
    """A dimension or option. `name`: in the table; `asks`: overrides that ask for it, on `processes` beside those of
    the pipeline; `acts`: whether it makes a difference in a run; `key`: rows of one key exclude each other."""

    name: str
    asks: tuple[str, ...]
    processes: int
    acts: Callable[[Seen], bool]
    family: str = "dense"
    key: str | None = None


def _trains_embedding(seen: Seen) -> bool:
    method = seen.config.method
    return method.type != "freeze" or "embed.weight" in method.modules


def _is_spread(layout: Layout) -> bool:
    """Whether gradients are reduced or activations sent, so that something can overlap."""
    return layout.tp * layout.fsdp * layout.dp_replicate > 1


def _zero(stage: int) -> Row:
    return Row(
        f"`zero: {stage}`",
        (f"parallel.zero={stage}",),
        2,
        lambda seen: seen.layout.fsdp > 1 and seen.config.parallel.zero == stage,
        key="zero",
    )


def _recompute(name: str, value: str, acts: Callable[[object], bool]) -> Row:
    return Row(
        name,
        (f"parallel.recompute={value}",),
        1,
        lambda seen: acts(seen.config.parallel.recompute),
        key="recompute",
    )


ROWS = (
    Row("`tensor`", ("parallel.tensor=2",), 2, lambda seen: seen.layout.tp > 1),
    Row(
        "`context`, ring",
        ("parallel.context=2",),
        2,
        lambda seen: seen.layout.cp > 1 and seen.config.parallel.context_method == "ring",
        key="context",
    ),
    Row(
        "`context`, ulysses",
        ("parallel.context=2", "parallel.context_method=ulysses"),
        2,
        lambda seen: seen.layout.cp > 1 and seen.config.parallel.context_method == "ulysses",
        key="context",
    ),
    Row(
        "`expert`",
        ("parallel.expert=2",),
        2,
        lambda seen: seen.layout.ep > 1 and seen.layout.etp == seen.layout.tp,
        "moe",
        key="expert",
    ),
    Row(
        "`expert` with `expert_tensor: 1`",
        ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"),
        2,
        lambda seen: seen.layout.ep > 1 and seen.layout.etp < seen.layout.tp,
        "moe",
        key="expert",
    ),
    Row("data parallel", (), 2, lambda seen: seen.layout.dp_shard > 1),
    *map(_zero, range(4)),
    Row("`replicate`", ("parallel.replicate=2",), 2, lambda seen: seen.layout.dp_replicate > 1),
    _recompute("`recompute: selective`", "selective", lambda mode: mode == "selective"),
    _recompute("`recompute: full`", "full", lambda mode: mode == "full"),
    _recompute("`recompute: 2` (every n-th layer)", "2", lambda mode: isinstance(mode, int)),
    Row("`offload`", ("parallel.offload=true",), 1, lambda seen: seen.config.parallel.offload),
    Row(
        "`overlap: false`",
        ("parallel.overlap=false",),
        2,
        lambda seen: not seen.config.parallel.overlap and _is_spread(seen.layout),
    ),
    Row(
        "tied embeddings",
        (),
        1,
        lambda seen: seen.spec.tied_embeddings and _trains_embedding(seen),
        "dense-tied",
    ),
    Row(
        "`stages` (uneven)",
        ("parallel.stages=",),
        1,
        lambda seen: seen.config.parallel.stages is not None,
    ),
    *(
        Row(
            f"`moe.{key}`",
            (f"moe.{key}={value}",),
            1,
            lambda seen, key=key: seen.spec.moe is not None and bool(getattr(seen.config.moe, key)),
            "mla-moe",
        )
        for key, value in (("aux_loss", 0.01), ("bias_rate", 0.001), ("capacity", 1.25))
    ),
    Row(
        "`method.dropout`",
        ("method.dropout=0.1",),
        1,
        lambda seen: seen.config.method.type == "lora" and seen.config.method.dropout > 0,
    ),
)


@cache
def all_seen() -> tuple[Seen, ...]:
    """Every run, those of few processes first."""
    found = []
    for family, settings in FAMILIES.items():
        spec = family_for(settings).spec(settings)
        for run in runs_of(family):
            config = config_of(Case(family, run.method, run.section))
            found.append(Seen(run, config, layout_of(config.parallel, run.processes), spec))
    return tuple(sorted(found, key=lambda seen: seen.run.processes))


def tested(method: str, schedule: str, row: Row) -> Run | None:
    """The first run of the cell."""
    for seen in all_seen():
        if seen.config.method.type == method and seen.schedule == schedule and row.acts(seen):
            return seen.run
    return None


def refusal(method: str, schedule: str, row: Row) -> str | None:
    """The message with which a run that asks for nothing but this cell is refused; None where it is not."""
    asks = ["parallel.zero=1", *METHODS[method]]
    if schedule != "none":
        asks += ["parallel.pipeline=2", f"parallel.schedule={schedule}"]
    asks += [f"{ask}{SCHEDULES[schedule]}" if ask.endswith("stages=") else ask for ask in row.asks]
    settings = FAMILIES[row.family]
    processes = row.processes * (1 if schedule == "none" else 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("model: {path: m}\ndata: {train: [t.jsonl]}\ncheckpoint: {folder: runs/x}\n")
        try:
            check(load_config(path, asks), family_for(settings).spec(settings), processes)
        except MegatuneError as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Matrix:
    """`cells`: text by (method, schedule, row's name); `messages`: of refusals, numbered from 1; `wrong`: cells that
    are neither tested nor refused, or both, each as a sentence; `named`: ids of the runs that stand in it."""

    cells: dict[tuple[str, str, str], str]
    messages: tuple[str, ...]
    wrong: tuple[str, ...]
    named: frozenset[str]


def matrix(
    find: Callable[[str, str, Row], Run | None] = tested,
    refuse: Callable[[str, str, Row], str | None] = refusal,
) -> Matrix:
    """Every cell; `find` and `refuse`: what is tested and what is refused."""
    cells, messages, wrong, named = {}, [], [], set()
    for method, schedule, row in product(METHODS, SCHEDULES, ROWS):
        run, message = find(method, schedule, row), refuse(method, schedule, row)
        if (run is None) == (message is None):
            what = "neither tested nor refused" if run is None else f"refused, but {run.id} is a test"
            wrong.append(f"{method}, schedule {schedule}, {row.name}: {what}")
        elif run is not None:
            cells[method, schedule, row.name] = f"tested `{run.id}`"
            named.add(run.id)
        else:
            if message not in messages:
                messages.append(message)
            cells[method, schedule, row.name] = f"refused ({messages.index(message) + 1})"
    return Matrix(cells, tuple(messages), tuple(wrong), frozenset(named))


def unmet_pairs() -> list[str]:
    """Pairs of rows that can stand in one run and stand in none."""
    return [
        f"{one.name} and {other.name}"
        for one, other in combinations(ROWS, 2)
        if (one.key is None or one.key != other.key)
        and not any(one.acts(seen) and other.acts(seen) for seen in all_seen())
    ]


def tables(found: Matrix) -> str:
    """A table for each method, and the messages."""
    if found.wrong:
        raise ValueError("; ".join(found.wrong))
    parts = []
    for method in METHODS:
        titles = ["no pipeline" if name == "none" else f"`{name}`" for name in SCHEDULES]
        rows = ([row.name, *(found.cells[method, name, row.name] for name in SCHEDULES)] for row in ROWS)
        parts.append("\n".join(_table([f"`{method}`", *titles], rows)))
    messages = [f"{number}. {message}" for number, message in enumerate(found.messages, 1)]
    return "\n\n".join([*parts, "Refused, with the message:", "\n".join(messages)])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def page(text: str, made: str) -> str:
    """`text` with `made` between its markers. ValueError where they are not there, once each and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page must have {BEGIN} and {END}, once each")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/parallelism.md"
    found = matrix()
    problems = [*found.wrong, *(f"{pair} meet in no run" for pair in unmet_pairs())]
    if problems:
        sys.exit("\n".join(problems))
    target.write_text(page(target.read_text("utf-8"), tables(found)), "utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
