"""The runs that parity is shown for: families, layouts (processes, `parallel` section) and methods.

`docs/parallelism.md` is made of this table: every combination of method, schedule and dimension or option that is not
refused has a run here, which `tools/make_parallel_docs.py` looks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Layouts = dict[str, tuple[int, dict[str, Any]]]

# Every dimension alone, all pairs, triples; schedules, stages of ZeRO and methods of context parallelism among them.
DENSE: Layouts = {
    "dp2-zero0": (2, {"zero": 0}),
    "dp2-zero2": (2, {"zero": 2}),
    "dp2-zero3": (2, {"zero": 3}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-gpipe": (2, {"pipeline": 2, "schedule": "gpipe"}),
    "pp2-interleaved": (2, {"pipeline": 2, "schedule": "interleaved"}),
    "pp2-zb-h1": (2, {"pipeline": 2, "schedule": "zb-h1"}),
    "pp2-zbv": (2, {"pipeline": 2, "schedule": "zbv"}),
    "pp2-uneven": (2, {"pipeline": 2, "stages": [3, 1]}),
    "cp2": (2, {"context": 2}),
    "cp2-ulysses": (2, {"context": 2, "context_method": "ulysses"}),
    "tp4": (4, {"tensor": 4}),
    "pp4": (4, {"pipeline": 4}),
    "cp4": (4, {"context": 4}),
    "dp4-zero1": (4, {"zero": 1}),
    "dp2x2-zero3": (4, {"zero": 3, "replicate": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2-cp2": (4, {"tensor": 2, "context": 2}),
    "tp2-dp2-zero2": (4, {"tensor": 2, "zero": 2}),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero": 3}),
    "pp2-cp2": (4, {"pipeline": 2, "context": 2}),
    "pp2-dp2-zero1": (4, {"pipeline": 2, "zero": 1}),
    "pp2-dp2-zero3": (4, {"pipeline": 2, "zero": 3}),
    "cp2-dp2-zero3": (4, {"context": 2, "zero": 3}),
    "cp2-ulysses-tp2": (4, {"context": 2, "context_method": "ulysses", "tensor": 2}),
    "tp2-pp2-dp2": (8, {"tensor": 2, "pipeline": 2, "zero": 2}),
    "tp2-pp2-dp2-zbv": (8, {"tensor": 2, "pipeline": 2, "zero": 1, "schedule": "zbv"}),
    "tp2-cp2-dp2": (8, {"tensor": 2, "context": 2, "zero": 3}),
    "tp2-pp2-cp2": (8, {"tensor": 2, "pipeline": 2, "context": 2}),
    "pp2-cp2-dp2": (8, {"pipeline": 2, "context": 2, "zero": 1}),
}
# Added for models with experts: ep with each other dimension, and with two.
EXPERTS: Layouts = {
    "ep2": (2, {"expert": 2}),
    "ep2-zero3": (4, {"expert": 2, "zero": 3}),
    "ep4": (4, {"expert": 4}),
    "tp2-ep2": (4, {"tensor": 2, "expert": 2}),
    "tp2-ep2-etp1": (4, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "tp2-ep4-etp1": (4, {"tensor": 2, "expert": 4, "expert_tensor": 1}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
    "cp2-ep2": (2, {"context": 2, "expert": 2}),
    "pp2-ep2-dp2": (8, {"pipeline": 2, "expert": 2, "zero": 2}),
    "ep2-tp2-dp2": (8, {"tensor": 2, "expert": 2, "zero": 3}),
    "pp2-cp2-ep2": (4, {"pipeline": 2, "context": 2, "expert": 2}),
    "tp2-cp2-ep2": (4, {"tensor": 2, "context": 2, "expert": 2}),
    "tp2-pp2-ep2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
}


_ULYSSES = {"context": 2, "context_method": "ulysses"}
_EXPERTS1 = {"tensor": 2, "expert": 2, "expert_tensor": 1}
_SELECTIVE, _FULL, _EVERY2 = ({"recompute": mode} for mode in ("selective", "full", 2))
# Without pipeline: options that meet in no layout below.
_PAIRED: dict[str, Layouts] = {
    "dense": {
        "tp2-selective": (2, {"tensor": 2, "overlap": False} | _SELECTIVE),
        "dp2-recompute-offload": (2, {"zero": 1, "offload": True} | _FULL),
        "cp2-rep2-selective": (4, {"context": 2, "replicate": 2, "overlap": False} | _SELECTIVE),
        "cp2-ulysses-dp2-zero3": (4, _ULYSSES | {"zero": 3}),
    },
    "dense-tied": {"cp2-ulysses-zero2-recompute2": (2, _ULYSSES | {"zero": 2} | _EVERY2)},
    "moe-balanced": {
        "dp2x2-ep2-zero0": (4, {"replicate": 2, "expert": 2, "zero": 0}),
        "tp2-rep2-ep2-etp1-offload": (4, _EXPERTS1 | {"replicate": 2, "overlap": False, "offload": True}),
        "cp2-ulysses-rep2-ep2-zero2-offload": (
            4,
            _ULYSSES | {"replicate": 2, "expert": 2, "zero": 2, "overlap": False, "offload": True},
        ),
        "tp2-cp2-ep4-etp1-zero3-recompute2": (
            4,
            _EXPERTS1 | {"context": 2, "expert": 4, "zero": 3, "overlap": False} | _EVERY2,
        ),
        "tp2-dp2-ep4-etp1-zero0": (4, _EXPERTS1 | {"expert": 4, "zero": 0, "overlap": False}),
        "tp2-cp2-ulysses-ep4-etp1-zero2": (4, _EXPERTS1 | _ULYSSES | {"expert": 4, "zero": 2}),
    },
}


@dataclass(frozen=True)
class _Turn:
    """How options are dealt to the packed layouts of a schedule. `zeros`: stages of ZeRO of those with context,
    Ulysses, experts, and data parallelism alone; `recompute`: of those with tensor, context and replicas;
    `uneven`: layers of the stages, of the layouts whose names begin with one of `where`."""

    zeros: tuple[int, ...]
    recompute: tuple[dict[str, Any], ...]
    uneven: list[int]
    where: tuple[str, ...]


_TURNS = {
    "gpipe": _Turn((1, 0, 2, 3), (_SELECTIVE, _EVERY2, _FULL), [1, 3], ("pp2-cp2-ulysses", "pp2-dp2")),
    "1f1b": _Turn((2, 0, 3), (_FULL, _EVERY2, _SELECTIVE), [3, 1], ("pp2-cp2-1f1b",)),
    "interleaved": _Turn((3, 2, 0, 1), (_EVERY2, _SELECTIVE, _FULL), [2, 0, 1, 1], ("tp2-pp2",)),
    "zb-h1": _Turn((0, 2, 1), (_FULL, _SELECTIVE, _EVERY2), [1, 3], ("pp2-ep2",)),
    "zbv": _Turn((2, 1, 0), (_SELECTIVE, _FULL, _EVERY2), [1, 0, 2, 1], ("tp2-pp2-zbv", "pp2-rep2")),
}


def _packed() -> dict[str, Layouts]:
    """By family: layouts of few processes with as many options as go together, so that a few of them meet every
    dimension and option under every schedule. What stands together differs from schedule to schedule, so that all
    pairs meet too."""
    found = {family: dict(layouts) for family, layouts in _PAIRED.items()}
    for schedule, turn in _TURNS.items():
        base = {"pipeline": 2, "schedule": schedule}
        first, second, third = turn.recompute
        dense = {
            "tp2-pp2": {"tensor": 2} | first,
            "pp2-cp2": {"context": 2, "zero": turn.zeros[0], "offload": True} | second,
            "pp2-rep2": {"replicate": 2, "overlap": False} | third,
        }
        if len(turn.zeros) > 3:
            dense["pp2-dp2"] = {"zero": turn.zeros[3]}
        tied = {"pp2-cp2-ulysses": _ULYSSES | {"zero": turn.zeros[1]} | third}
        moe = {
            "pp2-ep2": {"expert": 2, "zero": turn.zeros[2]} | first,
            "tp2-pp2-ep2-etp1": _EXPERTS1 | second,
        }
        for family, some in (("dense", dense), ("dense-tied", tied), ("moe-balanced", moe)):
            for stem, section in some.items():
                name = f"{stem}-{schedule}"
                stages = {"stages": turn.uneven} if name.startswith(turn.where) else {}
                section = base | section | stages
                found[family][f"{name}{_options(section)}"] = (4, section)
    return found


def _options(section: dict[str, Any]) -> str:
    """The end of a layout's name."""
    mode = section.get("recompute")
    parts = {
        f"-zero{section.get('zero')}": "zero" in section,
        "-uneven": "stages" in section,
        "-selective": mode == "selective",
        "-recompute": mode == "full",
        f"-recompute{mode}": isinstance(mode, int),
        "-offload": "offload" in section,
    }
    return "".join(name for name, holds in parts.items() if holds)


PACKED = _packed()
# What "dense" shows already and costs time again: left out of the other families, which keep every dimension alone,
# every pair and every triple.
_SHOWN = {
    "pp2-gpipe",
    "pp2-uneven",
    "tp2-dp2-zero2",
    "dp4-zero1",
    "cp2-ulysses-tp2",
    "tp2-pp2-dp2-zbv",
    "pp2-dp2-zero1",
}
LEFT_OUT = {
    "dense-tied": _SHOWN,
    "moe": _SHOWN | {"tp4", "cp4", "dp2-zero2", "pp2-interleaved", "pp2-cp2-dp2"},
    "mla-moe": _SHOWN
    | {
        "tp4",
        "cp4",
        "pp2-interleaved",
        "dp2-zero0",
        "dp2-zero2",
        "tp2-ep4-etp1",
        "tp2-pp2-ep2",
        "pp2-cp2-dp2",
    },
}
# Other methods than full and LoRA, for one family each: where something of them differs by layout.
FREEZE = (
    "tp2-selective",
    "dp2-recompute-offload",
    "cp2-ulysses-zero2-recompute2",
    "dp2-zero0",
    "dp2-zero2",
    "dp2-zero3",
    "cp2",
    "dp2x2-zero3",
    "pp2-dp2-zero1",
    "ep2",
    "tp2-ep2-etp1",
    "dp2x2-ep2-zero0",
)
DROPOUT = (
    "dp2-zero0",
    "ep2",
    "tp2-ep2-etp1",
    "cp2-rep2-selective",
    "cp2-ulysses-zero2-recompute2",
    "pp2-cp2-gpipe-zero1-recompute2-offload",
    "pp2-ep2-1f1b-zero3-recompute",
    "tp2-pp2-interleaved-uneven-recompute2",
    "tp2-pp2-ep2-etp1-zb-h1-selective",
    "pp2-cp2-ulysses-zbv-zero1-recompute2",
)


@dataclass(frozen=True)
class Run:
    """One case of `tests/parallel/test_parity.py`: a family, a layout and a method of `tests.helpers.parity`."""

    family: str
    layout: str
    method: str
    processes: int
    section: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.family}-{self.layout}-{self.method}"

    @property
    def layers(self) -> int:
        """Layers of the model: more than two only show something more where they are dealt to stages."""
        return 4 if "pipeline" in self.section else 2


def layouts_of(family: str) -> Layouts:
    """All layouts of a family of `tests.helpers.parity`."""
    packed = PACKED.get(family, {})
    if family == "moe-balanced":
        return packed
    layouts = (DENSE | EXPERTS if "moe" in family else DENSE) | packed
    return {name: layout for name, layout in layouts.items() if name not in LEFT_OUT.get(family, ())}


def runs_of(family: str) -> Iterator[Run]:
    """All runs of a family: full and LoRA in each layout; the other methods once, in the pipelines that were packed and
    in a few more layouts."""
    own = PACKED.get(family, {}) | {"dense": DENSE, "moe": EXPERTS}.get(family, {})
    freeze = "freeze-embed" if family == "dense-tied" else "freeze"
    for layout, (processes, section) in layouts_of(family).items():
        methods = ["full", "lora"]
        is_packed = layout in PACKED.get(family, {})
        if layout in own and (layout in FREEZE or (is_packed and "pipeline" in section)):
            methods.append(freeze)
        if layout in own and layout in DROPOUT:
            methods.append("lora-dropout")
        for method in methods:
            yield Run(family, layout, method, processes, section)
