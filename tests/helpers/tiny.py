"""Tiny models and data sets on disk, made without transformers: fast enough for every test session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_ANIMALS = ["cat", "dog", "horse", "owl", "fox", "whale", "bee", "crow", "goat", "newt"]
_PLACES = ["barn", "forest", "harbour", "library", "kitchen", "desert", "tower", "meadow"]
_VERBS = ["sleeps", "sings", "waits", "hides", "reads", "dances"]


def make_tokenizer(folder: Path, vocab_size: int = 320) -> Tokenizer:
    """Write tokenizer.json (byte-level BPE trained on the tiny data's own text) and its config with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = [m["content"] for row in tiny_rows(200) for m in row["messages"]]
    tokenizer.train_from_iterator([*text, "system user assistant\n"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer


def make_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 128,
    vocab_size: int = 320,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a Llama folder as the Hugging Face hub has them, random weights and a real small tokenizer.

    `config`: further keys of config.json, or other values for those set here. Returns `folder`.
    """
    make_tokenizer(folder, vocab_size)
    head_dim = hidden // heads
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.06).to(dtype)

    def norm() -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype)

    weights = {"model.embed_tokens.weight": matrix(vocab_size, hidden), "model.norm.weight": norm()}
    if not tied:
        weights["lm_head.weight"] = matrix(vocab_size, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights[prefix + "input_layernorm.weight"] = norm()
        weights[prefix + "post_attention_layernorm.weight"] = norm()
        weights[prefix + "self_attn.q_proj.weight"] = matrix(heads * head_dim, hidden)
        weights[prefix + "self_attn.k_proj.weight"] = matrix(kv_heads * head_dim, hidden)
        weights[prefix + "self_attn.v_proj.weight"] = matrix(kv_heads * head_dim, hidden)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(mlp, hidden)
        weights[prefix + "mlp.up_proj.weight"] = matrix(mlp, hidden)
        weights[prefix + "mlp.down_proj.weight"] = matrix(hidden, mlp)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": SPECIAL.index("<|im_start|>"),
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    generation = {"bos_token_id": settings["bos_token_id"], "eos_token_id": settings["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return folder


def tiny_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows in messages form, all different up to 480, some with a system message and some of two turns."""
    rows = []
    for i in range(first, first + count):
        animal = _ANIMALS[i % len(_ANIMALS)]
        place = _PLACES[i // len(_ANIMALS) % len(_PLACES)]
        verb = _VERBS[i // (len(_ANIMALS) * len(_PLACES)) % len(_VERBS)]
        messages = [
            {"role": "user", "content": f"Where is the {animal}?"},
            {"role": "assistant", "content": f"The {animal} {verb} in the {place}."},
        ]
        if i % 3 == 0:
            messages.insert(0, {"role": "system", "content": "You know where animals are."})
        if i % 4 == 1:
            messages += [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": f"Yes, the {animal} is in the {place}."},
            ]
        rows.append({"messages": messages})
    return rows


def make_data(folder: Path, train: int = 64, held_out: int = 16) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl (no row in both); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, (tiny_rows(train), tiny_rows(held_out, first=train)), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths
