"""QLoRA: a quantised base trains, resumes, exports, and gives the same numbers under layouts that do not cut it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megatune
from megatune import adapters, models
from megatune.errors import ConfigError
from megatune.launch import preflight
from megatune.ops import quant
from megatune.plan.dry_run import dry_run
from megatune.plan.estimate import estimate
from megatune.plan.mesh import Mesh
from megatune.plan.shapes import shape_of
from tests.helpers.dist import run_ranks
from tests.helpers.parity import FAMILIES
from tests.helpers.runs import LORA, losses, tensors, tiny_config
from tests.unit.test_plan_dry_run import LLAMA, config_for
from tests.unit.test_plan_estimate import WIDE

EVERYTHING = os.environ.get("MEGATUNE_QUANT_LAYOUTS") == "all"
# (what the base is quantised to, `parallel` section), on two processes. With MEGATUNE_QUANT_LAYOUTS=all those too that
# the default suite leaves out. Tensor parallelism cuts rows and blocks, which each process then scales by itself: so
# there the weights are such that it makes no difference (`_even`).
LAYOUTS: dict[str, tuple[quant.Kind, dict[str, Any]]] = {
    "dp2-zero3": ("nf4", {"zero": 3}),
    "tp2": ("int8", {"tensor": 2}),
    "dp2-zero1": ("nf4", {"zero": 1}),
    "pp2": ("nf4", {"pipeline": 2}),
    "cp2-selective": ("nf4", {"context": 2, "recompute": "selective"}),
    "dp2-full-offload": ("nf4", {"zero": 2, "recompute": "full", "offload": True}),
    "pp2-zb-h1": ("nf4", {"pipeline": 2, "schedule": "zb-h1", "zero": 1}),
    "tp2-in-turn": ("int8", {"tensor": 2, "overlap": False, "recompute": "full"}),
}
DEFAULT = ("dp2-zero3", "tp2")


def config_of(model: Path, data: tuple[Path, Path], folder: Path, kind: str | None, **changes: Any):
    return tiny_config(model, data, folder, method=LORA, model__quantise=kind, **changes)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_one_process(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    config = config_of(tiny_llama, tiny_data, tmp_path / "run", kind, train__steps=4)
    result = megatune.train(config)
    trained = losses(tmp_path / "run")
    assert len(trained) == 4 and trained[-1] < trained[0]
    merged, adapter = tensors(result.exports["merged"]), tensors(result.exports["adapter"])
    base = tensors(tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"  # not fused: quantised as it stands in the file
    frozen = quant.FrozenWeight(kind, tuple(base[name].shape), torch.float32)
    frozen.keep(base[name])
    a, b = (
        next(value for key, value in adapter.items() if f"layers.1.mlp.down_proj.lora_{which}" in key)
        for which in "AB"
    )
    change = b @ a * (LORA["alpha"] / LORA["rank"])
    torch.testing.assert_close(merged[name], frozen.dense(torch.float32) + change, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(merged[name], base[name] + change, rtol=1e-4, atol=1e-4)
    # The rest is not quantised.
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_resuming_quantises_the_same(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    constant = {"optim__schedule": "constant", "optim__warmup": 0, "checkpoint__every": 2}
    megatune.train(config_of(tiny_llama, tiny_data, tmp_path / "a", "nf4", **constant, train__steps=4))
    for steps in (2, 4):
        megatune.train(
            config_of(tiny_llama, tiny_data, tmp_path / "b", "nf4", **constant, train__steps=steps)
        )
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(ConfigError, match="model.quantise"):
        megatune.train(config_of(tiny_llama, tiny_data, tmp_path / "b", "int8", **constant, train__steps=6))


def _even(model: Path, folder: Path) -> Path:
    """The model with matrices that are whole multiples of 0.25 / 127, of which each 16 in a row have a 0.25: in int8
    they are the same however their rows are cut."""
    shutil.copytree(model, folder)
    weights = tensors(model)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            numbers = (weight * 127 / 0.25).round().clamp(-127, 127)
            numbers[:, ::16] = 127.0 * torch.where(numbers[:, ::16] < 0, -1.0, 1.0)
            weights[name] = numbers * 0.25 / 127
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Runs = dict[Path, tuple[Path, str, dict[str, Any]]]


def _run(rank: int, size: int, data: tuple[Path, Path], runs: Runs) -> None:
    for folder, (model, kind, section) in runs.items():
        megatune.train(config_of(model, data, folder, kind, train__steps=3, parallel=section))


@pytest.mark.timeout(300)
def test_layouts(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    folders = {"nf4": tiny_llama, "int8": _even(tiny_llama, tmp_path / "even")}
    alone: Runs = {tmp_path / f"alone-{kind}": (model, kind, {}) for kind, model in folders.items()}
    _run(0, 1, tiny_data, alone)
    chosen = LAYOUTS if EVERYTHING else DEFAULT
    runs = {tmp_path / name: (folders[LAYOUTS[name][0]], *LAYOUTS[name]) for name in chosen}
    run_ranks(_run, 2, tiny_data, runs, timeout=280)
    for name in chosen:
        expected = tmp_path / f"alone-{LAYOUTS[name][0]}"
        assert losses(tmp_path / name) == pytest.approx(losses(expected), rel=1e-5), name
        found, wanted = tensors(tmp_path / name / "merged"), tensors(expected / "merged")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            limit = 2e-5 * float(tensor.abs().max())
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=limit, msg=f"{name} {key}")


def test_refusals(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="model.quantise: nf4 is for frozen weights; set method.type to lora"
    ):
        tiny_config(tiny_llama, tiny_data, tmp_path, model__quantise="nf4")
    with pytest.raises(ValueError, match="train.compile: true does not go with model.quantise"):
        tiny_config(tiny_llama, tiny_data, tmp_path, model__quantise="nf4", method=LORA, train__compile=True)
    folder = tmp_path / "moe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["moe"]))
    config = tiny_config(folder, tiny_data, tmp_path, method=LORA, model__quantise="nf4")
    with pytest.raises(
        ConfigError, match="model.quantise: nf4 is for models without experts, and this one has 8"
    ):
        preflight.check_layout(config, 1)


@pytest.mark.parametrize("kind", quant.KINDS if EVERYTHING else ("nf4",))
def test_planned_memory(tmp_path: Path, kind: str) -> None:
    """The planner counts few bits, by arithmetic as by running the code without values; nothing is left behind."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | WIDE | {"num_hidden_layers": 2}))
    plain = Mesh.parse("tp2-dp2").apply(config_for(tmp_path, 8, method={"type": "lora", "rank": 8}))
    config = plain.model_copy(update={"model": plain.model.model_copy(update={"quantise": kind})})
    spec = shape_of(str(tmp_path))
    model = models.build(spec)
    adapters.attach(model, config.method)
    found, dense = (estimate(one, model, spec, 4, 2) for one in (config, plain))
    matrices = (dense.frozen - found.frozen) / (2 - {"nf4": 0.516, "int8": 1.0}[kind])
    assert 0.7 * dense.frozen < 2 * matrices < dense.frozen
    report = dry_run(config, spec, 4, 0)
    held = found.frozen + found.trainable + found.gradients + found.optimizer
    assert held == pytest.approx(
        report.weights + report.masters + report.gradients + report.optimizer, rel=0.002
    )
    assert type(quant.quantise_nf4(torch.randn(8, 64))[0]) is torch.Tensor
