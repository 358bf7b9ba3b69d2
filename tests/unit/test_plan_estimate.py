"""The planner's arithmetic against the run of the code itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatune import adapters, models
from megatune.config.layout import layout_of
from megatune.config.schema import FreezeMethod
from megatune.plan.dry_run import dry_run
from megatune.plan.estimate import estimate
from megatune.plan.mesh import Mesh
from megatune.plan.shapes import shape_of
from tests.unit.test_plan_dry_run import LLAMA, MOE, config_for

# Of real proportions: arithmetic leaves out what is small in these.
WIDE = {
    "vocab_size": 16384,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
WIDE_MOE = {
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
}
LORA = {"type": "lora", "rank": 8}
CASES = [
    ("llama", "dp4", {}, {}),
    ("llama", "tp2-pp2-dp2", {"recompute": "selective"}, {}),
    ("llama", "tp4-dp2", {"recompute": "full", "zero": 2}, {}),
    ("llama", "pp2-dp2", {"schedule": "interleaved", "zero": 0}, {}),
    ("llama", "pp2-cp2-dp2", {"recompute": 2}, {}),
    ("llama", "tp2-dp4", {"zero": 3}, {}),
    ("llama", "pp2-dp2", {"schedule": "zbv"}, {}),
    ("llama", "tp2-pp2-dp2", {}, {"method": LORA}),
    ("llama", "pp2-dp2", {}, {"optim": {"name": "lion"}}),
    ("llama", "pp2-dp2", {}, {"optim": {"name": "muon"}}),
    ("llama", "dp2", {}, {"optim": {"name": "adamw_8bit"}}),
    ("llama", "dp2", {}, {"optim": {"name": "adamw_bf16"}}),
    ("llama", "tp2-dp2", {"zero": 3}, {"optim": {"name": "adamw_bf16"}}),
    ("llama", "dp2", {"offload_optimizer": True, "zero": 2}, {}),
    ("moe", "tp2-pp2-dp4-ep4-etp1", {}, {}),
    ("moe", "tp2-pp2-dp2-ep2", {"recompute": "selective"}, {}),
    ("moe", "dp8-ep8", {"recompute": "full"}, {}),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, settings in (("llama", LLAMA | WIDE), ("moe", MOE | WIDE_MOE)):
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "config.json").write_text(json.dumps(settings))
    return found


@pytest.mark.parametrize(("name", "mesh", "parallel", "more"), CASES)
def test_as_much_as_the_dearest_process_has(
    shapes: dict[str, Path], name: str, mesh: str, parallel: dict[str, Any], more: dict[str, Any]
) -> None:
    given = Mesh.parse(mesh)
    data = {"train": ["t.jsonl"], "seq_length": 2048}
    config = config_for(shapes[name], 8, parallel={"zero": 1} | parallel, data=data, **more)
    config = given.apply(config)
    layout = layout_of(config.parallel, given.world_size)
    spec = shape_of(str(shapes[name]))
    model = models.build(spec)
    adapters.attach(model, config.method)
    wanted = estimate(config, model, spec, given.world_size, 2)
    report = dry_run(config, spec, given.world_size, wanted.pipeline_rank * (given.world_size // layout.pp))
    assert wanted.total == pytest.approx(report.peak, rel=0.12)
    if config.parallel.zero < 2:
        held = wanted.frozen + wanted.trainable + wanted.gradients + wanted.optimizer
        assert held == pytest.approx(
            report.weights + report.masters + report.gradients + report.optimizer, rel=0.002
        )


def test_the_dearest_process_is_found(shapes: dict[str, Path]) -> None:
    """1F1B: the first rank holds the most micro-batches."""
    config = Mesh.parse("pp4-dp1").apply(config_for(shapes["llama"], 16))
    spec = shape_of(str(shapes["llama"]))
    model = models.build(spec)
    adapters.attach(model, config.method)
    found = estimate(config, model, spec, 4, 2)
    assert found.pipeline_rank == 0
    assert found.tokens_per_step == 16 * 512
    assert found.rows()[-1] == ("total", found.total)
    # Layers before the first that is trained keep nothing.
    config.method = FreezeMethod(type="freeze", last_layers=1)
    adapters.attach(model, config.method)
    frozen = estimate(config, model, spec, 4, 2)
    assert frozen.pipeline_rank == 3 and frozen.activations < found.activations
