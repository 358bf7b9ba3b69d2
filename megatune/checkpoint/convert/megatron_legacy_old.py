"""Names in checkpoints of Megatron-LM from before Megatron-Core (up to 2023), as Megatron-Core's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatune.errors import CheckpointError

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_WITHIN = {
    "input_norm": "input_layernorm",
    "input_layernorm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "attention.dense": "self_attention.linear_proj",
    "post_attention_norm": "pre_mlp_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_FINAL = ("final_norm", "final_layernorm")
_UNGROUPED = 2.0  # versions before order q, k and v otherwise


def modern(model: Mapping[Any, Any], version: float, path: Path) -> Mapping[Any, Any]:
    """A module's state dict under Megatron-Core's names; new ones are returned as they are.

    The gate of their feed-forward blocks stands above up on each rank, as today. CheckpointError for files of
    `checkpoint_version` 0 and 1, whose q, k and v stand in another order.
    """
    inner = model.get("language_model")
    if not isinstance(inner, Mapping):
        return model
    if version < _UNGROUPED:
        raise CheckpointError(
            f"{path}: checkpoint_version {version:g} orders q, k and v as Megatron did before 2021; load and save it "
            "once with Megatron-LM 2021 or newer"
        )
    found: dict[str, Any] = {}
    for name, value in _flat(inner):
        found[_renamed(name)] = value
    for name, value in _flat({"head": model.get("word_embeddings_for_head", {})}):
        found["output_layer." + name.removeprefix("head.")] = value
    return found


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts with dotted names."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
        )
        leaves.extend(inner)
    return leaves


def _renamed(name: str) -> str:
    for stack in ("encoder.", "transformer."):
        name = name.removeprefix(stack)
    match = _LAYER.fullmatch(name)
    if match:
        module, _, kind = match[2].rpartition(".")
        return f"decoder.layers.{match[1]}.{_WITHIN.get(module, module)}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"decoder.final_layernorm.{kind}" if module in _FINAL else name
