"""The layouts that parity is shown for: name -> (processes, parallel section of the configuration)."""

from __future__ import annotations

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


def layouts_of(family: str) -> Layouts:
    """All layouts of a family of `tests.helpers.parity`."""
    return DENSE | EXPERTS if "moe" in family else DENSE
