"""What Megatron's optimizers keep beside their tensors, and the state dict of the plain mixed-precision one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatune.checkpoint.convert.base import SLOTS, Line, Opened, Options
from megatune.checkpoint.convert.megatron_names import MegatronTable
from megatune.checkpoint.convert.names import main_dtype
from megatune.checkpoint.convert.torch_zip import Streamed
from megatune.models.registry import family_for

HALVES = (torch.float16, torch.bfloat16)
UNSAID = Line(
    "optimizer.param_groups",
    "skipped",
    "the source does not say AdamW's settings: Megatron's defaults are written (betas 0.9, 0.999, eps 1e-8), and a "
    "schedule and random numbers that begin anew; set yours after loading, and load with "
    "--override-opt-param-scheduler (older versions: --override-opt_param-scheduler) and --no-load-rng",
)


@dataclass(frozen=True)
class Trained:
    """One weight of a rank's file that is trained; `states`: by slot."""

    key: str
    is_vector: bool
    is_expert: bool
    states: Mapping[str, Streamed]

    @property
    def decays(self) -> bool:
        return not (self.is_vector or self.key.endswith(".bias"))


def param_group(step: int, *, decays: bool, expert: bool) -> dict[str, Any]:
    """A group of parameters without them. The first four say which group it is (`param_group_identifier_keys`); the
    learning rate and weight decay are set by Megatron's scheduler when training starts; the rest are its defaults."""
    return {
        "wd_mult": 1.0 if decays else 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": expert,
        "is_decoupled_lr": False,
        "default_config": True,
        "lr": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "bias_correction": True,
        "step": step,
    }


def scheduler() -> dict[str, Any]:
    """`OptimizerParamScheduler.state_dict()` of a schedule at its beginning; Megatron loads no optimizer without it."""
    return {
        "max_lr": 0.0,
        "lr_warmup_steps": 0,
        "num_steps": 0,
        "lr_decay_style": "constant",
        "lr_decay_steps": 1,
        "min_lr": 0.0,
        "start_wd": 0.0,
        "end_wd": 0.0,
        "wd_incr_style": "constant",
        "wd_incr_steps": 1,
    }


def plain_optimizer(weights: Iterable[Trained], step: int, *, apart: bool) -> Any:
    """The `optimizer` of one rank's file: `Float16OptimizerWithFloat16Params.state_dict()`, or where there are no
    masters Adam's own state dict (`FP32Optimizer`). `weights`: in the order of the model's parameters. `apart`: experts
    have an optimizer of their own, with expert parallelism. Source: megatron/core/optimizer/optimizer.py (0.16.1)."""
    every = list(weights)
    if not apart:
        return _optimizer(every, step, (True, False), expert=False)
    dense, experts = ([one for one in every if one.is_expert is which] for which in (False, True))
    return [
        _optimizer(dense, step, (True, False), expert=False),
        _optimizer(experts, step, (True,), expert=True),
    ]


def _optimizer(weights: list[Trained], step: int, kinds: tuple[bool, ...], *, expert: bool) -> dict[str, Any]:
    state: dict[int, dict[str, Streamed]] = {}
    groups, masters = [], []
    for decays in kinds:
        own = [one for one in weights if one.decays is decays]
        numbers = list(range(len(state), len(state) + len(own)))
        for number, one in zip(numbers, own, strict=True):
            state[number] = {slot: one.states[slot] for slot in SLOTS[1:]}
        groups.append(param_group(step, decays=decays, expert=expert) | {"params": numbers})
        masters.append([one.states["master"] for one in own if "master" in one.states])
    adam = {"state": state, "param_groups": groups}
    if not any(masters) and weights:
        return adam
    return {"optimizer": adam, "fp32_from_fp16_params": masters}


def with_states(opened: Opened, options: Options) -> Opened:
    """`opened` with the optimizer states that a legacy file has a place for; the report says why some have none."""
    source = opened.optimizer
    if not source:
        return replace(opened, step=None)
    dtype, own = options.dtype or main_dtype(opened.weights), main_dtype(opened.weights)
    table = MegatronTable(family_for(opened.hf_config).spec(opened.hf_config))
    trained = [one for one in table.tensors.values() if not one.fp32]
    wanted = {piece.hf_name for one in trained for piece in one.pieces}
    lacking = [slot for slot in SLOTS if slot in source or slot != "master"]
    lacking = [slot for slot in lacking if slot not in source or not wanted <= source[slot].names()]
    if lacking:
        why = f"the source lacks {' and '.join(lacking)} of some weights"
    elif not opened.step:
        why = "the source does not say after which step they are, and Megatron loads none of a release"
    elif dtype not in HALVES and dtype != own:
        why = (
            "a run in fp32 has no masters beside its weights, which are rounded here; choose --dtype bfloat16"
        )
    elif dtype in HALVES:
        return opened
    else:  # the weights themselves are the masters
        return replace(opened, optimizer={slot: source[slot] for slot in SLOTS[1:]})
    lines = [*opened.report, Line("optimizer states", "skipped", why)]
    return replace(opened, optimizer={}, step=None, report=lines)
