"""For an unknown key: the one that was probably meant."""

from __future__ import annotations

from difflib import get_close_matches

from megatune.config import describe

# What other programs call it; by the key's last word. Words of our own schema need no entry.
ALIASES = {
    "accumulation": "train.global_batch_size",
    "activation_checkpointing": "parallel.recompute",
    "adapter": "method",
    "base_model": "model.path",
    "batch_size": "train.global_batch_size",
    "bf16": "model.dtype",
    "checkpointing": "checkpoint",
    "context_parallel_size": "parallel.context",
    "cp": "parallel.context",
    "cutoff_len": "data.seq_length",
    "dataset": "data",
    "datasets": "data",
    "distributed": "parallel",
    "ep": "parallel.expert",
    "eval_steps": "train.eval_every",
    "finetuning_type": "method.type",
    "grad_clip": "optim.clip",
    "gradient_accumulation": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_checkpointing": "parallel.recompute",
    "gradient_clipping": "optim.clip",
    "learning_rate": "optim.lr",
    "logging": "track",
    "logging_steps": "train.log_every",
    "lora": "method",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lora_target_modules": "method.targets",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "max_length": "data.seq_length",
    "max_seq_len": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "max_steps": "train.steps",
    "mbs": "train.micro_batch_size",
    "gbs": "train.global_batch_size",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "name_or_path": "model.path",
    "nproc_per_node": "launch.nproc",
    "num_train_epochs": "train.epochs",
    "optimizer": "optim",
    "output_dir": "checkpoint.folder",
    "parallelism": "parallel",
    "peft": "method",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "precision": "model.dtype",
    "r": "method.rank",
    "resume_from_checkpoint": "checkpoint.resume",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "scheduler": "optim.schedule",
    "sequence_length": "data.seq_length",
    "target_modules": "method.targets",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "torch_dtype": "model.dtype",
    "tp": "parallel.tensor",
    "trainer": "train",
    "training": "train",
    "use_rslora": "method.rslora",
    "val": "data.eval",
    "val_set_size": "data.eval_fraction",
    "validation": "data.eval",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "zero_stage": "parallel.zero",
}


def suggest(key: tuple[str, ...], is_mapping: bool = False) -> list[str]:
    """Dotted keys that may be meant by the unknown `key`, best first; empty where nothing comes near.

    `is_mapping`: its value is a mapping, so that only a key that takes one can be meant.
    """
    name = key[-1].lower().replace("-", "_")
    known = [k for k in describe.all_keys() if not is_mapping or _takes_mapping(k)]
    if name in ALIASES and ALIASES[name] in known:
        return [ALIASES[name]]
    same = [k for k in known if k.rsplit(".", 1)[-1] == name and k != ".".join(key)]
    if same:
        return same
    misspelt = get_close_matches(name, ALIASES, 1, 0.9)
    if misspelt and ALIASES[misspelt[0]] in known:
        return [ALIASES[misspelt[0]]]
    prefix = ".".join(key[:-1])
    here = [k for k in known if k.rpartition(".")[0] == prefix]
    near = _nearest(name, here, 0.6)
    if near or is_mapping:
        return near
    return _nearest(name, known, 0.75)


def _nearest(name: str, known: list[str], cutoff: float) -> list[str]:
    by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    return [by_name[match] for match in get_close_matches(name, by_name, 1, cutoff)]


def _takes_mapping(key: str) -> bool:
    node = describe.find(tuple(key.split(".")))
    return node is not None and describe.may_be_mapping(node)
