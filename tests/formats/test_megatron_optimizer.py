"""Optimizer states of legacy Megatron checkpoints: each goes to its weight, proven by the masters, or stays behind."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatune.checkpoint.convert.base import SLOTS, Opened, Options
from megatune.checkpoint.convert.core import convert
from megatune.checkpoint.convert.megatron_args import megatron_args
from megatune.checkpoint.convert.megatron_legacy import FORMAT
from megatune.checkpoint.convert.megatron_legacy_write import LegacyTarget
from megatune.checkpoint.convert.megatron_names import Backend
from megatune.checkpoint.convert.megatune_run import open_run
from megatune.models.registry import family_for
from tests.formats import mcore
from tests.helpers.dist import run_ranks
from tests.helpers.megatron import Tensors, add_optimizer, load_rank, model, same_tensors

FILE, FLAT = "model_optim_rng.pt", "distrib_optim.pt"

LAYOUT = {"tensor": 2, "pipeline": 2, "virtual": 2, "vocab_multiple": 4}


def saved(root: Path, family: str, flat: bool, **layout: Any) -> Path:
    """A legacy checkpoint of a training run with optimizer states; what they are lies in `root / truth`."""
    target = LegacyTarget(model(family), Options(**LAYOUT | layout), "local")
    for job in target.jobs():
        target.make(job, root / "saved")
    (root / "saved/release").rename(root / "saved/iter_0000002")
    add_optimizer(root / "saved", flat, root / "truth")
    return root / "saved"


def ranks(folder: Path) -> list[Path]:
    return sorted(folder.rglob(FILE))


def why_not(folder: Path) -> str:
    """The report's reason for leaving the states behind."""
    opened = FORMAT.open(folder, Options())
    (line,) = (line for line in opened.report if line.what == "skipped")
    assert line.tensor == "optimizer" and opened.optimizer == {}
    return line.detail


@pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])
@pytest.mark.parametrize(("family", "layout"), [("qwen3", {}), ("qwen3_moe", {"expert": 2})])
def test_states_come_through(family: str, layout: dict[str, int], flat: bool, tmp_path: Path) -> None:
    """Two tensor parallel ranks, two stages of two chunks, experts on two: to our format, bit for bit."""
    folder = saved(tmp_path, family, flat, **layout)
    convert(folder, tmp_path / "ours", "megatune", verify=True, workers=1)
    ours = open_run(tmp_path / "ours", Options())
    assert ours.step == 2 and same_tensors(ours.weights, model(family).weights) == []
    for slot in SLOTS:
        truth = FORMAT.open(tmp_path / "truth" / slot, Options()).weights
        assert same_tensors(ours.optimizer[slot], truth) == [], slot


@cache
def trained(family: str, dtype: torch.dtype = torch.bfloat16) -> Opened:
    """A model after 7 steps of AdamW: masters that round to the weights, moments."""
    base, generator = model(family), torch.Generator().manual_seed(1)
    names = sorted(name for name in base.weights.names() if not name.endswith("correction_bias"))
    whole = {name: base.weights.rows(name, 0, base.weights.shape(name)[0]) for name in base.weights.names()}
    if dtype == torch.float32:
        whole = {name: weight.float() for name, weight in whole.items()}
    slots = {"master": {name: whole[name].float() for name in names}}
    if dtype != torch.float32:
        slots["master"] = {name: one * (1 + 2**-11) for name, one in slots["master"].items()}
    for slot in SLOTS[1:]:
        slots[slot] = {name: torch.randn(whole[name].shape, generator=generator) for name in names}
    optimizer = {slot: Tensors(tensors) for slot, tensors in slots.items()}
    return replace(base, weights=Tensors(whole), optimizer=optimizer, step=7)


def written(opened: Opened, folder: Path, backend: Backend = "te", **layout: Any) -> Path:
    options = Options(**{"vocab_multiple": 4} | layout)
    target = LegacyTarget(FORMAT.takes(opened, options), options, backend)
    for job in target.jobs():
        target.make(job, folder)
        size = (folder / job.file).stat().st_size
        assert abs(size - job.size) <= 0.1 * size + 32768
    target.finish(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", LAYOUT),
        ("llama-tied", {"pipeline": 2}),
        ("deepseek", {"tensor": 2, "expert": 4}),
    ],
)
def test_states_are_written(family: str, layout: dict[str, int], tmp_path: Path) -> None:
    """For the plain optimizer, at any layout: read back they prove themselves and are the same."""
    opened = trained(family)
    back = FORMAT.open(written(opened, tmp_path, **layout), Options())
    assert back.step == 7 and same_tensors(back.weights, opened.weights) == []
    assert back.optimizer.keys() == set(SLOTS), back.report
    for slot in SLOTS:
        assert same_tensors(back.optimizer[slot], opened.optimizer[slot]) == [], slot


def test_what_a_file_with_states_holds(tmp_path: Path) -> None:
    """As Float16OptimizerWithFloat16Params and FP32Optimizer save it, in groups with and without weight decay."""
    content = load_rank(ranks(written(trained("qwen3"), tmp_path / "half", tensor=2))[1])
    assert content["iteration"] == 7 and content["opt_param_scheduler"]["num_steps"] == 0
    adam, masters = content["optimizer"]["optimizer"], content["optimizer"]["fp32_from_fp16_params"]
    assert [group["wd_mult"] for group in adam["param_groups"]] == [1.0, 0.0]
    names = list(content["model"])
    groups = [[n for n in names if (content["model"][n].ndim == 1) is vector] for vector in (False, True)]
    assert [len(group["params"]) for group in adam["param_groups"]] == [len(group) for group in groups]
    for number, name in enumerate([*groups[0], *groups[1]]):
        assert adam["state"][number]["exp_avg"].shape == content["model"][name].shape, name
    for own, stored in zip(groups, masters, strict=True):
        for name, master in zip(own, stored, strict=True):
            assert torch.equal(master.bfloat16(), content["model"][name]), name
    source = trained("qwen3", torch.float32)
    back = FORMAT.open(written(source, tmp_path / "whole"), Options())
    assert same_tensors(back.optimizer["exp_avg_sq"], source.optimizer["exp_avg_sq"]) == []
    assert load_rank(ranks(tmp_path / "whole")[0])["optimizer"].keys() == {"state", "param_groups"}


def _swap_states(content: dict[str, Any]) -> None:
    """States of two output projections, which have one shape."""
    optimizer = content["optimizer"]
    first, second = _equal_shapes(optimizer["fp32_from_fp16_params"][0])
    for run in (optimizer["optimizer"]["state"], optimizer["fp32_from_fp16_params"][0]):
        run[first], run[second] = run[second], run[first]


def _equal_shapes(tensors: list[Tensor]) -> tuple[int, int]:
    shapes = [one.shape for one in tensors]
    return next((i, shapes.index(shape, i + 1)) for i, shape in enumerate(shapes) if shape in shapes[i + 1 :])


def _one_less(content: dict[str, Any]) -> None:
    content["optimizer"]["optimizer"]["param_groups"][1]["params"].pop()
    content["optimizer"]["fp32_from_fp16_params"][1].pop()


def _no_steps(content: dict[str, Any]) -> None:
    content["optimizer"]["optimizer"]["state"] = {}


def _of_sgd(content: dict[str, Any]) -> None:
    state = content["optimizer"]["optimizer"]["state"]
    for number, one in state.items():
        state[number] = {"momentum_buffer": one["exp_avg"]}


def _gone(content: dict[str, Any]) -> None:
    del content["optimizer"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            _swap_states,
            r"mp_rank_01_001: the fp32 master in the place of decoder.layers.0.* is not that weight",
        ),
        (_one_less, "mp_rank_01_001: its 17 states are not those of its 18 weights"),
        (_no_steps, "mp_rank_01_001: has no state for each parameter: it was saved before the first step"),
        (_of_sgd, "mp_rank_01_001: holds other states than Adam's exp_avg and exp_avg_sq"),
        (_gone, "mp_rank_01_001: is without optimizer states, though other files have some"),
    ],
)
def test_states_that_prove_nothing_stay_behind(
    spoil: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    path = ranks(saved(tmp_path, "qwen3", False))[-1]
    content = load_rank(path)
    spoil(content)
    torch.save(content, path)
    assert re.search(reason, why_not(tmp_path / "saved"))


def test_states_of_a_run_in_fp32(tmp_path: Path) -> None:
    """Adam's state dict alone: its weights are the masters, so that order and shapes say what belongs together."""
    folder = saved(tmp_path, "qwen3", False, dtype=torch.float32)
    for path in ranks(folder):
        content = load_rank(path)
        torch.save(content | {"optimizer": content["optimizer"]["optimizer"]}, path)
    opened = FORMAT.open(folder, Options())
    assert same_tensors(opened.optimizer["master"], opened.weights) == []
    for slot in SLOTS[1:]:
        truth = FORMAT.open(tmp_path / "truth" / slot, Options()).weights
        assert same_tensors(opened.optimizer[slot], truth) == [], slot
    assert [line.tensor for line in opened.report if "order and shape alone" in line.detail] == ["optimizer"]
    content = load_rank(path)
    content["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(content, path)
    assert "mp_rank_01_001: its 18 states are not those of its 18 weights" in why_not(folder)


def _buffers(path: Path) -> dict[Any, Any]:
    return torch.load(path.parent / FLAT, weights_only=True)


def test_flat_states_in_another_order_stay_behind(tmp_path: Path) -> None:
    """Two output projections have one shape: their states swapped in all buffers are noticed."""
    folder = saved(tmp_path, "qwen3", True, virtual=1)
    path = ranks(folder)[0]
    states, weights = _buffers(path), load_rank(path)["model"]
    ((_, buffer),) = states[0].items()
    found = []
    for layer in (0, 1):
        weight = weights[f"decoder.layers.{layer}.self_attention.linear_proj.weight"].reshape(-1)
        windows = buffer["param"].bfloat16().unfold(0, weight.numel(), 1)
        found.append(int((windows == weight).all(1).nonzero()))
    for slot in ("param", "exp_avg", "exp_avg_sq"):
        first, second = (buffer[slot][at : at + weight.numel()] for at in found)
        first[:], second[:] = second.clone(), first.clone()
    torch.save(states, path.parent / FLAT)
    place = "decoder.layers.1.self_attention.linear_proj.weight"
    assert f"mp_rank_00_000: the fp32 master in the place of {place} is not that weight" in why_not(folder)


def test_flat_states_that_do_not_fit_stay_behind(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3", True, virtual=1)
    path = ranks(folder)[0]
    states = _buffers(path)
    ((key, buffer),) = states[0].items()
    longer = {slot: torch.cat([one, one[:64]]) for slot, one in buffer.items() if isinstance(one, Tensor)}
    torch.save({0: {key: longer}}, path.parent / FLAT)
    assert "do not fill a buffer of" in why_not(folder)
    torch.save({0: {key: {slot: [one] for slot, one in longer.items()}}}, path.parent / FLAT)
    assert "is older than February 2024" in why_not(folder)
    torch.save({0: {key: longer | {"exp_avg": longer["param"][1:].clone()}}}, path.parent / FLAT)
    assert "buffers of unequal lengths" in why_not(folder)
    torch.save([None, states], path.parent / FLAT)
    assert "lacks the states of the weights that are no experts" in why_not(folder)


def test_equal_weights_that_do_not_tell_their_states_apart_stay_behind(tmp_path: Path) -> None:
    """Weights of zeros are equal to the gaps between states, too."""
    folder = saved(tmp_path, "qwen3", True, virtual=1)
    for path in ranks(folder):
        content, states = load_rank(path), _buffers(path)
        for weight in content["model"].values():
            weight.zero_()
        torch.save(content, path)
        ((_, buffer),) = states[0].items()
        buffer["param"].zero_()
        torch.save(states, path.parent / FLAT)
    assert "do not tell where its state begins" in why_not(folder)


# ---- by Megatron-Core itself

# name -> (family, tensor, pipeline, expert parallel size, kind of optimizer); the rest of 4 processes is data parallel.
CASES = {
    "plain": ("qwen3", 2, 2, 1, "plain"),
    "fp32": ("qwen3", 2, 2, 1, "fp32"),
    "flat": ("qwen3", 2, 2, 1, "flat"),
    "flat-shards": ("llama", 1, 2, 1, "flat"),
    "flat-tied": ("llama-tied", 2, 1, 1, "flat"),
    "experts": ("mixtral", 2, 1, 2, "plain"),
    "flat-experts": ("mixtral", 1, 1, 2, "flat"),
}


def megatron_saves(rank: int, world: int, names: list[str], root: str) -> None:
    """Two steps of Megatron's optimizers from random gradients, saved as Megatron-LM does; and, for comparison, one
    checkpoint more for each slot, whose weights are the states."""
    from megatron.core import parallel_state

    mcore.prepare()
    mcore.without_cuda()
    for name in names:
        parallel_state.destroy_model_parallel()
        _, tensor, pipeline, expert, _ = CASES[name]
        mcore.prepare(tensor, pipeline, expert)
        _save(rank, name, Path(root) / name)
        torch.distributed.barrier()


def _save(rank: int, name: str, root: Path) -> None:
    from megatron.core import parallel_state

    family, tensor, pipeline, expert, kind = CASES[name]
    config = model(family).hf_config
    stage, at = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    options = Options(tensor=tensor, pipeline=pipeline, expert=expert, vocab_multiple=4)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    args = argparse.Namespace(**megatron_args(config, dtype, options)[0])
    gpt = mcore.gpt(
        family_for(config).spec(config),
        args.padded_vocab_size,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        pre_process=stage == 0,
        post_process=stage == pipeline - 1,
    )
    optimizer = _optimizer(gpt, kind)
    place = f"mp_rank_{at:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
    place += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if expert > 1 else ""
    saves = parallel_state.get_expert_data_parallel_rank() == 0
    states = gpt.state_dict()
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 2}
    if saves:
        for slot in ("weights", *SLOTS):
            (root / slot / "iter_0000002" / place).mkdir(parents=True)
        torch.save(
            content | {"model": states, "optimizer": optimizer.state_dict()},
            root / "weights/iter_0000002" / place / FILE,
        )
    if kind == "flat":
        optimizer.save_parameter_state(str(root / "weights/iter_0000002" / place / FLAT))
    truth = _truth(gpt, optimizer, kind)
    if saves:
        for slot in SLOTS:
            saved = {key: truth[key][slot] if key in truth else value for key, value in states.items()}
            torch.save(content | {"model": saved}, root / slot / "iter_0000002" / place / FILE)


def _optimizer(gpt: Any, kind: str, bucket: int = 40) -> Any:
    """After two steps with random gradients, with buckets of about this size where it is the distributed one."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    half, flat = kind != "fp32", kind == "flat"
    if half:
        gpt.bfloat16().config.bf16 = True
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=flat, overlap_grad_reduce=flat, bucket_size=bucket if flat else None
    )
    whole = DistributedDataParallel(gpt.config, ddp, gpt)
    settings = OptimizerConfig(
        lr=1e-2,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=flat,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(settings, [whole])
    # What tensor parallel processes have in common has the same gradient on each.
    common = parallel_state.get_tensor_model_parallel_world_size()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() // common)
    for _ in range(2):
        for buffer in whole.buffers + whole.expert_parallel_buffers:
            buffer.grad_data.normal_(generator=generator)
        assert optimizer.step()[0]
    return optimizer


def _truth(gpt: Any, optimizer: Any, kind: str) -> dict[str, dict[str, Tensor]]:
    """Whole states by name, put together of the data parallel processes' shards."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, parameter in gpt.named_parameters():
        apart = not getattr(parameter, "allreduce", True)
        inner = optimizer.chained_optimizers[1 if apart else 0]
        if kind == "flat":
            whole = {slot: torch.zeros(parameter.numel()) for slot in SLOTS}
            shards: list[Any] = [None] * inner.data_parallel_group.size()
            mine = None
            if parameter in inner.model_param_gbuf_map and parameter in inner.model_param_group_index_map:
                span = inner._get_model_param_range_map(parameter)["param"]
                mine = (span.start, span.end, inner._get_main_param_and_optimizer_states(parameter))
            torch.distributed.all_gather_object(shards, mine, group=inner.data_parallel_group)
            for start, end, states in filter(None, shards):
                for slot in SLOTS:
                    whole[slot][start:end] = states["param" if slot == "master" else slot].detach()
            found[key] = {slot: states.view(parameter.shape) for slot, states in whole.items()}
        else:
            master = parameter.main_param if kind == "plain" else parameter
            state = inner.optimizer.state[master]
            found[key] = {"master": master.detach(), **{slot: state[slot] for slot in SLOTS[1:]}}
    return found


@mcore.needs_mcore
def test_states_that_megatron_core_saves(tmp_path: Path) -> None:
    """Plain, fp32 and distributed optimizers at several layouts, with and without experts: bit for bit what each weight
    had."""
    run_ranks(megatron_saves, 4, list(CASES), str(tmp_path), timeout=240)
    for name, (_, _, _, _, kind) in CASES.items():
        opened = FORMAT.open(tmp_path / name / "weights", Options())
        assert opened.optimizer.keys() == set(SLOTS), (name, opened.report)
        for slot in SLOTS:
            truth = FORMAT.open(tmp_path / name / slot, Options()).weights
            assert same_tensors(opened.optimizer[slot], truth) == [], (name, slot)
        assert opened.weights.dtype("model.norm.weight") == (
            torch.float32 if kind == "fp32" else torch.bfloat16
        )


def megatron_loads(rank: int, world: int, names: list[str], root: str) -> None:
    """Files of ours, loaded into Megatron's model and plain optimizer; raises where a state is not what was written."""
    from megatron.core import parallel_state

    mcore.prepare()
    mcore.without_cuda()
    for name in names:
        parallel_state.destroy_model_parallel()
        _, tensor, pipeline, expert = LOADED[name]
        mcore.prepare(tensor, pipeline, expert)
        _load(name, Path(root) / name)
        torch.distributed.barrier()


def _load(name: str, folder: Path) -> None:
    from megatron.core import parallel_state

    family, tensor, pipeline, expert = LOADED[name]
    stage, at, owner = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    place = f"mp_rank_{at:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
    place += f"_{owner:03d}" if expert > 1 else ""
    content = load_rank(folder / "iter_0000007" / place / FILE)
    gpt = mcore.gpt(
        family_for(model(family).hf_config).spec(model(family).hf_config),
        content["args"].padded_vocab_size,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        pre_process=stage == 0,
        post_process=stage == pipeline - 1,
    )
    optimizer = _optimizer(gpt, "plain")
    gpt.load_state_dict(content["model"], strict=True)
    kept = content["optimizer"]
    for one in kept if isinstance(kept, list) else [kept]:
        # torch's AdamW, which stands in for Transformer Engine's, counts for each weight and not for each group.
        one["optimizer"]["state"]["common_step"] = torch.tensor(7.0)
    optimizer.load_state_dict(kept)
    states = _truth(gpt, optimizer, "plain")
    assert {id(parameter) for parameter in gpt.parameters()} and states
    for slot in SLOTS:
        place_of_slot = folder.parent / f"{name}-{slot}" / "release" / place / FILE
        wanted = load_rank(place_of_slot)["model"]
        for key, found in states.items():
            assert torch.equal(found[slot], wanted[key]), (name, key, slot)


LOADED = {
    "dense": ("qwen3", 2, 2, 1),
    "tied": ("qwen2", 2, 1, 1),
    "experts": ("mixtral", 2, 1, 2),
    "latent": ("deepseek", 2, 1, 2),
}


@mcore.needs_mcore
def test_megatron_core_loads_states_of_ours(tmp_path: Path) -> None:
    for name, (family, tensor, pipeline, expert) in LOADED.items():
        layout = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
        opened = trained(family)
        written(opened, tmp_path / name, "local", **layout)
        for slot in SLOTS:
            rest = {
                key: one for key, one in opened.weights.tensors.items() if key.endswith("correction_bias")
            }
            other = Tensors(opened.optimizer[slot].tensors | rest)
            alone = replace(opened, weights=other, optimizer={})
            written(alone, tmp_path / f"{name}-{slot}", "local", **layout)
    run_ranks(megatron_loads, 4, list(LOADED), str(tmp_path), timeout=240)
