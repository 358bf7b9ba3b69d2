"""The tiny model and data that other tests stand on are what transformers takes them for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import make_llama


def test_transformers_loads_every_weight(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(tiny_llama, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert len(tokenizer) <= model.config.vocab_size
    messages = [{"role": "user", "content": "Où est-il? 2 + 2"}, {"role": "assistant", "content": "The cat."}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids[0] == model.config.bos_token_id and model.config.eos_token_id in ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_depend_on_the_seed_only(tmp_path: Path, tied: bool) -> None:
    files = [
        (
            make_llama(tmp_path / name, layers=1, hidden=16, tied=tied, seed=seed) / "model.safetensors"
        ).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert files[0] == files[1] != files[2]


def test_rows_are_valid_and_not_shared(tiny_data: tuple[Path, Path]) -> None:
    train, held_out = ([json.loads(line) for line in path.read_text().splitlines()] for path in tiny_data)
    assert len(train) == 64 and len(held_out) == 16
    texts = {json.dumps(row) for row in train}
    assert len(texts) == 64 and not texts & {json.dumps(row) for row in held_out}
    assert all(row["messages"][-1]["role"] == "assistant" for row in train)
