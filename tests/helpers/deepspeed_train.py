"""Train a tiny Llama with deepspeed under many settings and save: `torchrun deepspeed_train.py FOLDER [CASE...]`.

Writes FOLDER/CASE: the checkpoint, `hf/config.json`, `universal/` (DeepSpeed's own conversion, where it can) and
`truth.pt`: what DeepSpeed itself says the weights and states are.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

STEPS = 3
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero1_fp16": {"stage": 1, "dtype": "fp16"},
    "zero1_frozen": {"stage": 1, "frozen": True},
    "zero1_fp32_sums": {"stage": 1, "more": FP32_SUMS},  # BF16_Optimizer
    "zero2": {"stage": 2},
    "zero2_tied_fp32": {"stage": 2, "tied": True, "dtype": None},
    "zero2_frozen": {"stage": 2, "frozen": True},
    "zero2_shuffled": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "zero2_aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "zero2_elastic": {"stage": 2, "zero": {"elastic_checkpoint": True}},
    "zero3": {"stage": 3},
    "zero3_sub_groups": {"stage": 3, "zero": {"sub_group_size": 500}},
    "zero3_tied_frozen": {"stage": 3, "tied": True, "frozen": True},
}


def train(case: dict[str, Any], folder: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=11,  # odd sizes: every kind of padding
        intermediate_size=23,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=case.get("tied", False),
    )
    config.architectures = ["LlamaForCausalLM"]
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.get("frozen") and "mlp" in name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == matrices]} for matrices in (True, False)]
    dtype = case.get("dtype", "bf16")
    settings = {
        "train_batch_size": 2 * ranks,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        **({dtype: {"enabled": True}} if dtype else {}),
        **case.get("more", {}),
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, 37, (2, 9), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(folder))
    states = _states(engine, case)
    module = _module(engine, case)
    dist.barrier()
    if rank == 0:
        config.save_pretrained(folder / "hf")
        _write_truth(folder, case, states, module)
    dist.barrier()
    engine.destroy()


def _states(engine: Any, case: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """What the engine has in memory. Not for shuffled parameters: its API mixes them up there (0.19.8). Moments of
    stages 1 and 2 come from the universal conversion."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    if case["stage"] == 0 or case.get("zero", {}).get("round_robin_gradients"):
        return found
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found.setdefault("master", {})[name] = safe_get_full_fp32_param(parameter).clone()
            for slot in ("exp_avg", "exp_avg_sq") if case["stage"] == 3 else ():
                found.setdefault(slot, {})[name] = safe_get_full_optimizer_state(parameter, slot).clone()
    return found


def _module(engine: Any, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the model as they are in training."""
    if case["stage"] < 3:
        return {name: one.clone() for name, one in engine.module.state_dict().items()}
    parameters = list(engine.module.named_parameters(remove_duplicate=False))
    with deepspeed.zero.GatheredParameters([one for _, one in parameters]):
        return {name: one.detach().clone() for name, one in parameters}


def _write_truth(
    folder: Path,
    case: dict[str, Any],
    states: dict[str, dict[str, torch.Tensor]],
    module: dict[str, torch.Tensor],
) -> None:
    consolidated: dict[str, torch.Tensor] = {}
    if case["stage"] > 0 and case.get("more") is not FP32_SUMS:  # which DeepSpeed's script does not read
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        consolidated = {name: one.clone() for name, one in found.items()}
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--input_folder"]
        command += [
            str(folder / f"global_step{STEPS}"),
            "--output_folder",
            str(folder / f"universal/global_step{STEPS}"),
        ]
        if not {"elastic_checkpoint", "round_robin_gradients"} & case.get("zero", {}).keys():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    truth = {"step": STEPS, "states": states, "module": module, "consolidated": consolidated}
    torch.save(truth, folder / "truth.pt")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for name in sys.argv[2:] or CASES:
        train(CASES[name], Path(sys.argv[1]) / name)


if __name__ == "__main__":
    main()
