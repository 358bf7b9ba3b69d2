"""torch_dist's flat buckets of optimizer states (dp_reshardable): each state goes to its weight, proven by the masters,
whatever layout they were saved under, or stays behind."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatune.checkpoint.convert.base import SLOTS, Opened, Options
from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.megatron_args import megatron_args
from megatune.checkpoint.convert.megatron_legacy import FORMAT as LEGACY
from megatune.checkpoint.convert.megatron_legacy_write import LegacyTarget
from megatune.checkpoint.convert.megatron_names import MegatronTable
from megatune.checkpoint.convert.megatron_order import in_order
from megatune.checkpoint.convert.torch_dist import FORMAT
from megatune.checkpoint.hf import write_json
from megatune.models.registry import family_for
from tests.formats import mcore
from tests.formats.test_dcp import write
from tests.formats.test_megatron_optimizer import FILE, _optimizer, _truth
from tests.helpers.dist import run_ranks
from tests.helpers.megatron import add_optimizer, model, same_tensors

STEP = "iter_0000002"


def saved(root: Path, family: str, backend: str = "te", **layout: int) -> dict[str, Tensor]:
    """All tensors of a torch_dist checkpoint whose states are flat buckets of a layout; what they are lies in `root /
    truth`."""
    options = Options(vocab_multiple=4, **layout)
    target = LegacyTarget(model(family), options, backend)
    for job in target.jobs():
        target.make(job, root / "legacy")
    sizes = (options.tensor, options.expert)
    buckets = add_optimizer(root / "legacy", False, root / "truth", sizes)
    dist = FORMAT.target(model(family), options)
    for job in dist.jobs():
        dist.make(job, root / "whole")
    dist.finish(root / "whole")
    folder = DcpFolder(root / "whole/release")
    weights = {name: folder.rows(name, 0, folder.shape(name)[0]) for name in folder.names()}
    return weights | buckets


def opened(root: Path, family: str, tensors: dict[str, Tensor]) -> Opened:
    common = io.BytesIO()
    torch.save([{"iteration": 2}], common)
    (root / "dist").mkdir()
    write(root / "dist" / STEP, tensors, {"common_state/shard_0_1": common.getvalue()})
    (root / "dist" / STEP / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_json(root / "dist" / "config.json", model(family).hf_config)
    return FORMAT.open(root / "dist", Options())


def compare(found: Opened, truth: Path) -> None:
    assert found.optimizer.keys() == set(SLOTS), [line for line in found.report if line.what == "skipped"]
    for slot in SLOTS:
        wanted = LEGACY.open(truth / slot, Options()).weights
        untrained = [name for name in wanted.names() if name.endswith("correction_bias")]
        assert same_tensors(found.optimizer[slot], wanted) == sorted(untrained), slot


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("family", "backend", "layout"),
    [
        ("qwen3", "te", {"tensor": 2, "pipeline": 2, "virtual": 2}),
        ("llama-tied", "local", {"pipeline": 2}),
        ("deepseek", "te", {"tensor": 2, "pipeline": 2, "expert": 2}),
    ],
)
def test_states_come_through(family: str, backend: str, layout: dict[str, int], tmp_path: Path) -> None:
    found = opened(tmp_path, family, saved(tmp_path, family, backend, **layout))
    assert found.step == 2 and same_tensors(found.weights, model(family).weights) == []
    compare(found, tmp_path / "truth")
    assert not [line for line in found.report if line.what == "skipped"]


def _swap(tensors: dict[str, Tensor], first: str) -> None:
    """The contents of two rows of a bucket."""
    flat = tensors[first + "param"]
    flat[:64], flat[64:128] = flat[64:128].clone(), flat[:64].clone()


def _longer(tensors: dict[str, Tensor], first: str) -> None:
    for slot in ("param", "exp_avg", "exp_avg_sq"):
        tensors[first + slot] = torch.cat([tensors[first + slot], torch.zeros(64)])


def _unequal(tensors: dict[str, Tensor], first: str) -> None:
    tensors[first + "exp_avg"] = tensors[first + "exp_avg"][1:].clone()


def _gone(tensors: dict[str, Tensor], first: str) -> None:
    del tensors[first + "exp_avg_sq"]


def _all_equal(tensors: dict[str, Tensor], first: str) -> None:
    for tensor in tensors.values():
        tensor.fill_(1.0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_swap, "the fp32 master in the place of output_layer.weight is not that weight"),
        (_longer, "not those of the model's weights in any layout"),
        (_unequal, "are not whole"),
        (_gone, "are not whole"),
        (_all_equal, "so equal that they do not tell their states apart"),
    ],
)
def test_states_that_prove_nothing_stay_behind(
    spoil: Callable[[dict[str, Tensor], str], None], reason: str, tmp_path: Path
) -> None:
    tensors = saved(tmp_path, "llama")
    spoil(tensors, min(name for name in tensors if name.startswith("optimizer.")).rpartition(".")[0] + ".")
    found = opened(tmp_path, "llama", tensors)
    assert found.optimizer == {}
    said = {line.detail for line in found.report if line.what == "skipped"}
    assert len(said) == 1 and reason in said.pop()


def test_the_order_of_modules() -> None:
    """As `named_parameters()` of Megatron-Core's layers with Transformer Engine."""
    table = MegatronTable(family_for(model("qwen3").hf_config).spec(model("qwen3").hf_config))
    names = [one.name for one in in_order(table.tensors.values(), "te")]
    layer = [name.removeprefix("decoder.layers.0.") for name in names if ".layers.0." in name]
    assert layer == [
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    ends = [names[0], *names[-2:]]
    assert ends == [
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


# ---- by Megatron-Core itself

# name -> (family, tensor, pipeline, expert parallel size); the rest of 4 processes is data parallel.
CASES = {
    "tensor": ("qwen3", 2, 2, 1),
    "shards": ("llama", 1, 2, 1),
    "data": ("qwen3", 1, 1, 1),
    "tied-biases": ("qwen2", 2, 1, 1),
    "experts": ("mixtral", 2, 1, 2),
    "experts-together": ("mixtral", 2, 2, 1),
    "latent": ("deepseek", 2, 1, 2),
}
METADATA = {
    "distrib_optim_sharding_type": "dp_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def megatron_saves(rank: int, world: int, names: list[str], root: str) -> None:
    """Two steps of the distributed optimizer from random gradients, saved as Megatron-LM does by default; and a legacy
    checkpoint for each slot, whose weights are the states."""
    from megatron.core import parallel_state

    mcore.prepare()
    mcore.without_cuda()
    for name in names:
        parallel_state.destroy_model_parallel()
        mcore.prepare(*CASES[name][1:])
        _save(name, Path(root) / name)
        torch.distributed.barrier()


def _save(name: str, root: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    family, tensor, pipeline, expert = CASES[name]
    config = model(family).hf_config
    stage, at = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    options = Options(tensor=tensor, pipeline=pipeline, expert=expert, vocab_multiple=4)
    args = argparse.Namespace(**megatron_args(config, torch.bfloat16, options)[0])
    pieces = {"pre_process": stage == 0, "post_process": stage == pipeline - 1}
    spec = family_for(config).spec(config)
    gpt = mcore.gpt(spec, args.padded_vocab_size, tensor=tensor, pipeline=pipeline, expert=expert, **pieces)
    optimizer = _optimizer(gpt, "flat", 3000)  # smaller ones would leave a process without a share of one
    place = f"mp_rank_{at:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
    place += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if expert > 1 else ""
    truth, states = _truth(gpt, optimizer, "flat"), gpt.state_dict()
    if parallel_state.get_expert_data_parallel_rank() == 0:
        for slot in SLOTS:
            (root / "truth" / slot / STEP / place).mkdir(parents=True)
            kept = {key: truth[key][slot] if key in truth else value for key, value in states.items()}
            content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 2, "model": kept}
            torch.save(content, root / "truth" / slot / STEP / place / FILE)
    step = root / "dist" / STEP
    if torch.distributed.get_rank() == 0:
        step.mkdir(parents=True)
        write_json(root / "dist" / "config.json", config)
    torch.distributed.barrier()
    sharded = gpt.sharded_state_dict(metadata=dict(METADATA))
    moments = optimizer.sharded_state_dict(sharded, metadata=dict(METADATA))
    whole = {**sharded, "optimizer": moments, "iteration": 2, "args": args}
    dist_checkpointing.save(whole, str(step), content_metadata=METADATA)


@mcore.needs_mcore
def test_states_that_megatron_core_saves(tmp_path: Path) -> None:
    """Several layouts, with and without experts, buckets and shards: bit for bit what each weight had."""
    run_ranks(megatron_saves, 4, list(CASES), str(tmp_path), timeout=300)
    for name in CASES:
        compare(FORMAT.open(tmp_path / name / "dist", Options()), tmp_path / name / "truth")
