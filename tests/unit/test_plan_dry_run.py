"""Single processes of large layouts, run without them: what they hold and send is what arithmetic says."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatune.config.layout import layout_of
from megatune.config.schema import Config
from megatune.errors import ConfigError, ParallelError
from megatune.models import DecoderSpec, LayerSpec, RopeSpec, shard_specs
from megatune.parallel import World
from megatune.parallel.pipeline.schedules import play, schedule
from megatune.parallel.shard import Cut, local_shape
from megatune.parallel.stages import Stage
from megatune.plan.dry_run import Report, dry_run
from megatune.plan.mesh import Mesh, rank_of, roles
from megatune.plan.shapes import shape_of
from megatune.plan.tracker import Tracker

ROOT = Path(__file__).parents[2]
LENGTH = 512
LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
MOE = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but a config.json."""
    found = {}
    for name, settings in (("llama", LLAMA), ("moe", MOE)):
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "config.json").write_text(json.dumps(settings))
    return found


def config_for(path: Path, batch: int, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(path), "dtype": "bf16"},
            "data": {"train": ["t.jsonl"], "seq_length": LENGTH},
            "checkpoint": {"folder": "runs/x"},
            "train": {"global_batch_size": batch},
            "parallel": {"zero": 1},
        }
        | sections
    )


def plan(config: Config, mesh: str, role: str) -> tuple[Report, DecoderSpec]:
    given = Mesh.parse(mesh)
    config = given.apply(config)
    layout = layout_of(config.parallel, given.world_size)
    spec = shape_of(config.model.path)
    return dry_run(config, spec, given.world_size, rank_of(role, layout)), spec


def local_sizes(spec: DecoderSpec, stages: tuple[Stage, ...], cut: Cut) -> dict[bool, int]:
    """Elements that a process holds, of the dense parameters and of experts."""
    sizes = {False: 0, True: 0}
    for one in shard_specs(spec, stages).values():
        if not one.name.endswith("correction"):  # a buffer
            sizes[one.expert] += math.prod(local_shape(one, cut))
    return sizes


@pytest.mark.parametrize("role", ["first", "middle", "last"])
def test_dense_process_of_64(shapes: dict[str, Path], role: str) -> None:
    tp, dp, count = 2, 8, 6
    report, spec = plan(config_for(shapes["llama"], dp * count), "tp2-pp4-dp8", role)
    held = local_sizes(spec, report.stages, Cut(tp=(0, tp)))[False]
    assert report.parameters == report.trainable == held
    # Buckets pad each parameter for the shards; 2 bytes a weight, then 4, 8 and 4 + 4 / dp.
    assert report.weights == pytest.approx(2 * held, rel=0.02) and report.weights >= 2 * held
    assert report.masters == 4 * (report.weights // 2) // dp
    assert report.optimizer == pytest.approx(2 * report.masters, rel=1e-3)
    assert report.gradients == pytest.approx(dp * report.masters + report.masters, rel=0.01)
    assert report.micro_batches == count
    # Each layer gathers and scatters at both its blocks, backward gathers the input once more; embedding and head too.
    layers = sum(len(stage.layers) for stage in report.stages)
    ends = sum(stage.is_first + stage.is_last for stage in report.stages)
    whole = LENGTH * spec.hidden_size * 2
    wanted = count * (10 * layers + 2 * ends) * whole * (tp - 1) // tp
    assert report.sent["tp"] == pytest.approx(wanted, rel=0.02) and report.sent["tp"] >= wanted
    neighbours = {"first": 1, "middle": 2, "last": 1}[role]
    assert report.sent["pp"] == count * neighbours * whole // tp
    assert report.calls["pp"] == 2 * count * neighbours
    # Gradients reduce-scattered in fp32 and weights gathered in bf16, once a step.
    assert report.sent["fsdp"] == pytest.approx(6 * (report.weights // 2) * (dp - 1) // dp, rel=0.01)


def test_experts_of_a_process_of_64(shapes: dict[str, Path]) -> None:
    count, tp, ep = 3, 2, 8
    config = config_for(shapes["moe"], 16 * count, moe={"bias_rate": 0.1})
    report, spec = plan(config, "tp2-pp2-dp16-ep8-etp1", "last")
    held = local_sizes(spec, report.stages, Cut(tp=(0, tp), ep=(0, ep)))
    assert report.parameters == sum(held.values())
    rows = LENGTH // tp * spec.moe.top_k
    moe_layers = sum(spec.layers[index].moe for stage in report.stages for index in stage.layers)
    # To the experts and back, forward and backward.
    wanted = count * moe_layers * 4 * rows * spec.hidden_size * 2 * (ep - 1) // ep
    assert report.sent["ep"] == pytest.approx(wanted, rel=0.02) and report.sent["ep"] >= wanted
    # Their gradients and weights go over fewer processes.
    assert report.sent["efsdp"] == pytest.approx(6 * held[True] * 3 / 4, rel=0.02)


def test_expert_tensor_parallel_and_context(shapes: dict[str, Path]) -> None:
    report, spec = plan(config_for(shapes["moe"], 8), "tp2-pp2-cp2-dp4-ep4", "first")
    held = local_sizes(spec, report.stages, Cut(tp=(0, 2), ep=(0, 4), etp=(0, 2)))
    assert report.parameters == sum(held.values())
    assert report.layout.etp == 2 and report.sent["etp"] > 0 and report.sent["cp"] > 0


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"])
def test_schedules_keep_as_many_micro_batches_as_they_say(shapes: dict[str, Path], name: str) -> None:
    """A stage of `layers` layers keeps that many for each micro-batch under way."""
    virtual = 1 if name in ("gpipe", "1f1b", "zb-h1") else 2
    found = {}
    for count in (2, 8):
        config = config_for(shapes["llama"], count, parallel={"zero": 0, "schedule": name})
        found[count], _ = plan(config, "pp2-dp1", "first")
    pairs = {n: play(schedule(name, 2, virtual, n), lambda action: 1.0).peak[0] for n in (2, 8)}
    layers = 4 // (2 * virtual)
    hidden, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    layer = LENGTH * 2 * (4 * hidden + (16 + 8) * 16 + (16 + 4) * 16 + 16 * 16 + 3 * inner)
    assert found[8].activations == pytest.approx(pairs[8] * layers * layer, rel=0.5)
    difference = found[8].activations - found[2].activations
    assert difference == pytest.approx((pairs[8] - pairs[2]) * layers * layer, rel=0.1, abs=0.3 * layer)


def test_recompute_and_offload_lower_the_activations(shapes: dict[str, Path]) -> None:
    found = {}
    for mode in ("none", "selective", "full"):
        for offload in (False, True):
            parallel = {"zero": 1, "recompute": mode, "offload": offload}
            config = config_for(shapes["llama"], 8, parallel=parallel)
            config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 4096})})
            report, _ = plan(config, "tp2-pp2-dp2", "first")
            found[mode, offload] = report
    kept = {mode: report.activations for (mode, away), report in found.items() if not away}
    assert kept["none"] > kept["selective"] > kept["full"]
    for mode in kept:
        assert found[mode, True].activations < kept[mode]
        assert found[mode, True].sent == found[mode, False].sent
    # Selective recompute sends nothing twice, full does.
    assert found["selective", False].sent == found["none", False].sent
    assert found["full", False].sent["tp"] > found["none", False].sent["tp"]


def test_an_offloaded_optimizer_takes_no_memory_of_the_gpu(shapes: dict[str, Path]) -> None:
    reports = []
    for offload in (False, True):
        config = config_for(shapes["llama"], 4, parallel={"zero": 1, "offload_optimizer": offload})
        reports.append(plan(config, "dp2", "first")[0])
    plain, offloaded = reports
    assert plain.masters and plain.optimizer == 2 * plain.masters
    assert (offloaded.masters, offloaded.optimizer) == (0, 0)
    for what in ("weights", "gradients", "activations", "sent"):
        assert getattr(plain, what) == getattr(offloaded, what), what


def test_bf16_weights_without_masters_save_four_bytes(shapes: dict[str, Path]) -> None:
    """On one GPU: 2 of weights, 4 of gradients, 8 of moments; with fp32 masters 18."""
    config = config_for(shapes["llama"], 1, parallel={"zero": 1}, optim={"name": "adamw_bf16"})
    report, _ = plan(config, "dp1", "first")
    found = [report.weights, report.masters, report.gradients, report.optimizer]
    assert [size / report.parameters for size in found] == pytest.approx([2, 0, 4, 8], abs=0.02)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_stages_shard_what_they_say(shapes: dict[str, Path], zero: int) -> None:
    dp, count = 8, 4
    config = config_for(shapes["llama"], dp * count, parallel={"zero": zero, "recompute": "full"})
    report, spec = plan(config, "tp2-dp8", "first")
    held = local_sizes(spec, report.stages, Cut(tp=(0, 2)))[False]
    shards = dp if zero else 1
    assert report.optimizer == pytest.approx(8 * held / shards, rel=0.05)
    if zero == 3:
        assert report.weights == pytest.approx(4 * held / shards, rel=0.05)
    else:
        assert report.weights == pytest.approx(2 * held, rel=0.02)
        assert report.masters == pytest.approx(4 * held / shards, rel=0.02)
    wanted = {0: 4, 1: 4 + 4 / dp, 2: 4 / dp, 3: 4 / dp}[zero] * held
    assert report.gradients == pytest.approx(wanted, rel=0.05)
    share = held * (dp - 1) / dp
    # Stage 3 gathers for forward and backward of each micro-batch, 2 and 3 reduce in each.
    sent = {0: 8, 1: 4 + 2, 2: 4 * count + 2, 3: (4 + 2 + 2) * count}[zero] * share
    assert report.sent["fsdp"] == pytest.approx(sent, rel=0.1)


def test_lora_sends_and_holds_little(shapes: dict[str, Path]) -> None:
    method = {"type": "lora", "rank": 8, "dropout": 0.1}
    report, spec = plan(config_for(shapes["llama"], 16, method=method), "tp2-pp4-dp4", "first")
    whole = local_sizes(spec, report.stages, Cut(tp=(0, 2)))[False]
    assert report.parameters - report.trainable == whole
    assert 0 < report.trainable < whole / 10
    assert report.weights == pytest.approx(2 * whole + 4 * report.trainable, rel=0.02)
    assert report.sent["fsdp"] < 8 * report.trainable * 1.1
    # Nothing before the first stage's adapters is trained, so its own backward sends nothing on.
    full, _ = plan(config_for(shapes["llama"], 16), "tp2-pp4-dp4", "first")
    assert report.calls["pp"] == full.calls["pp"]


def test_more_micro_batches_than_are_run(shapes: dict[str, Path]) -> None:
    found = {}
    for count in (4, 5, 40):
        found[count], _ = plan(config_for(shapes["llama"], 2 * count), "tp2-pp2-dp2", "last")
    for axis in ("tp", "pp", "fsdp"):
        few, more, many = (found[count].sent[axis] for count in (4, 5, 40))
        assert many == few + 36 * (more - few), axis
    assert found[4].activations == found[5].activations == found[40].activations


def test_processes_of_one_role_are_alike(shapes: dict[str, Path]) -> None:
    config = Mesh.parse("tp2-pp2-dp4").apply(config_for(shapes["llama"], 4))
    spec = shape_of(str(shapes["llama"]))
    first, other = (dry_run(config, spec, 16, rank) for rank in (0, 5))
    assert (first.peak, first.sent, first.parameters) == (other.peak, other.sent, other.parameters)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatune", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


RECIPES = {
    "llama3_405b_full": ("tp8-pp16-dp80", 405_853_388_800),
    "deepseek_v3_671b_full": ("tp4-pp16-dp160-ep32-etp1", 671_026_419_200),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ten_thousand_gpus_on_a_laptop(name: str) -> None:
    mesh, parameters = RECIPES[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_cli(f"configs/recipes/{name}.yaml", "--mesh", mesh)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert f"{parameters:,} parameters on 10,240" in done.stdout.replace("\n", " ")
    for said in ("first (rank 0)", "embedding", "head", "optimizer", "sent a step"):
        assert said in " ".join(done.stdout.split()), done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert after.ru_maxrss < 8 * 2**20  # KiB; the largest child so far


def test_mistakes_end_with_one_sentence(shapes: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {shapes['llama']}}}\ndata: {{train: [t.jsonl]}}\ncheckpoint: {{folder: runs/x}}\n"
    )
    done = run_cli(str(path), "--mesh", "tp3-pp2")
    assert done.returncode == 2 and done.stderr.startswith("megatune: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tp2-pp2-x3", "'x3' in 'tp2-pp2-x3'"),
        ("tp2-tp2", "'tp2' in"),
        ("tp0", "'tp0' in"),
        ("", "'' in ''"),
        ("tp3-dp2", "tensor"),
        ("tp2-dp2-ep2", "parallel.expert is for mixture-of-experts models"),
        ("dp4-replicate3", "parallel.replicate: 3 does not divide the 4 data parallel processes"),
        ("dp3", "train.global_batch_size"),
    ],
)
def test_a_layout_that_cannot_be(shapes: dict[str, Path], mesh: str, message: str) -> None:
    with pytest.raises((ParallelError, ConfigError)) as error:
        plan(config_for(shapes["llama"], 8), mesh, "first")
    assert message in str(error.value)


def test_roles() -> None:
    layouts = {pp: replace(layout_of(config_for(Path("m"), 8).parallel, 1), pp=pp) for pp in (1, 2, 3)}
    assert [roles(layouts[pp]) for pp in (1, 2, 3)] == [
        ("first",),
        ("first", "last"),
        ("first", "middle", "last"),
    ]
    assert [rank_of(role, layouts[3]) for role in roles(layouts[3])] == [0, 1, 2]
    with pytest.raises(ParallelError, match="use first or last"):
        rank_of("middle", layouts[2])


def test_a_model_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no folder with a config.json"):
        shape_of("somebody/else-7B")


def test_tracker_counts_storages_and_their_peak() -> None:
    with Tracker(World.alone()) as tracker:
        a = torch.empty(100)
        b = a.view(10, 10)[:5] + 1
        assert tracker.live == 400 + 200
        b.untyped_storage().resize_(0)
        assert tracker.live == 400
        b.untyped_storage().resize_(200)
        del a
        assert tracker.live == 200 and tracker.peak == 600
        tracker.start_step()
        assert tracker.peak == 200 and not tracker.is_new(b) and tracker.is_new(torch.empty(1))


def test_windows_and_ropes_do_not_matter() -> None:
    """A model of another family goes through the same code."""
    spec = DecoderSpec(
        family="gemma3",
        vocab_size=512,
        hidden_size=64,
        mlp_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=(LayerSpec(window=100), LayerSpec(rope=1)),
        ropes=(RopeSpec(theta=1e4, dim=16), RopeSpec(theta=1e6, dim=16)),
        max_positions=1024,
        tied_embeddings=True,
        qk_norm="head",
        norm_placement="both",
    )
    config = Mesh.parse("tp2-pp2-dp2").apply(config_for(Path("m"), 4))
    report = dry_run(config, spec, 8, 0)
    assert report.parameters > 0 and report.sent["pp"] > 0
