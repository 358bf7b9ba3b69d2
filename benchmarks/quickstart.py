"""A training step of the quickstart against transformers + peft, and against its matrix products alone.

    python -m benchmarks.quickstart [--steps 5] [--threads N] [--out FILE]

Same weights (SmolLM2-135M-Instruct), same LoRA, same documents, one process with all cores. transformers gets each of
its usual forms: one padded batch, and one packed row with position ids and no mask. Tokens are real ones; padding does
not count. `limit` runs only the matrix products that the step cannot avoid, back to back.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.common import batch_of, report, row, time_step, trainer
from megatune import checkpoint
from megatune.config import load_config
from megatune.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


def documents(config, tokenizer, tokens: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Samples of the quickstart's training set until they hold about `tokens` tokens."""
    from megatune.data import encoded_samples

    ids, masks, total = [], [], 0
    for sample_ids, mask in encoded_samples(config, tokenizer):
        if total + len(sample_ids) > tokens:
            break
        ids.append(list(sample_ids))
        masks.append([bool(m) for m in mask])
        total += len(sample_ids)
    return ids, masks


def ours(config, source, batch, dtype, steps):
    run = trainer(
        config,
        source.spec,
        dtype,
        lambda weights: checkpoint.load_pretrained(weights, source.spec, source),
    )
    scored = len(batch.targets.labels)
    first = run.step([batch], scored).loss
    return first, time_step(lambda: run.step([batch], scored), 1, steps)


def theirs(config, source, ids, masks, dtype, steps, packed: bool):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, attn_implementation="sdpa")
    method = config.method
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=names))
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.optim.lr, fused=True
    )
    inputs = _packed(ids, masks) if packed else _padded(ids, masks)

    def step():
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first = step()
    return first, time_step(step, 1, steps)


def _labels(ids, masks):
    return [
        [t if m and i else -100 for i, (t, m) in enumerate(zip(d, k, strict=True))]
        for d, k in zip(ids, masks, strict=True)
    ]


def _padded(ids, masks):
    longest = max(len(d) for d in ids)
    rows = _labels(ids, masks)
    return {
        "input_ids": torch.tensor([d + [0] * (longest - len(d)) for d in ids]),
        "attention_mask": torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in ids]),
        "labels": torch.tensor([r + [-100] * (longest - len(r)) for r in rows]),
    }


def _packed(ids, masks):
    return {
        "input_ids": torch.tensor([[t for d in ids for t in d]]),
        "position_ids": torch.tensor([[i for d in ids for i in range(len(d))]]),
        "labels": torch.tensor([[t for r in _labels(ids, masks) for t in r]]),
    }


def limit(spec, tokens: int, scored: int, dtype: torch.dtype) -> float:
    """Seconds of the step's unavoidable products: forward and input gradient of each frozen matrix, no adapter."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    shapes = [
        (tokens, spec.hidden_size, heads, spec.num_layers),
        (tokens, spec.num_heads * spec.head_dim, spec.hidden_size, spec.num_layers),
        (tokens, spec.hidden_size, 2 * spec.mlp_size, spec.num_layers),
        (tokens, spec.mlp_size, spec.hidden_size, spec.num_layers),
        (scored, spec.hidden_size, spec.vocab_size, 1),
    ]
    total = 0.0
    for rows, inner, outer, count in shapes:
        x, w = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        y = torch.randn(rows, outer).to(dtype)
        for product in (lambda x=x, w=w: torch.nn.functional.linear(x, w), lambda y=y, w=w: y @ w):
            product()
            began = time.perf_counter()
            for _ in range(5):
                product()
            total += (time.perf_counter() - began) / 5 * count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["train.deterministic=false"])
    source = checkpoint.resolve_model(config.model.path)
    tokenizer = load_tokenizer(source.path)
    ids, masks = documents(config, tokenizer, args.tokens)
    tokens = sum(len(d) for d in ids)
    batch = batch_of(ids, masks)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        scored = len(batch.targets.labels)
        seconds = limit(source.spec, tokens, scored, dtype)
        rows.append(row(f"limit: matrix products alone, {name}", [seconds], tokens))
        loss, seconds = ours(config, source, batch, dtype, args.steps)
        rows.append(row(f"megatune, {name}", seconds, tokens, first_loss=round(loss, 5)))
        for packed in (False, True):
            loss, seconds = theirs(config, source, ids, masks, dtype, args.steps, packed)
            form = "packed" if packed else "padded"
            rows.append(
                row(f"transformers + peft, {form}, {name}", seconds, tokens, first_loss=round(loss, 5))
            )
    ratios = {}
    for name in ("float32", "bfloat16"):
        here = [r for r in rows if r["name"].endswith(name)]
        best = max(r["tokens_per_second"] for r in here if r["name"].startswith("transformers"))
        ours_here = next(r["tokens_per_second"] for r in here if r["name"].startswith("megatune"))
        ratios[name] = round(ours_here / best, 2)
    facts = {
        "documents": len(ids),
        "tokens": tokens,
        "scored_tokens": len(batch.targets.labels),
        "longest": max(len(d) for d in ids),
        "mean_length": round(statistics.mean(len(d) for d in ids), 1),
        "megatune_over_best_of_transformers_peft": ratios,
    }
    report("quickstart_step", rows, facts, args.out)
    print(f"megatune / the better form of transformers + peft: {ratios}")


if __name__ == "__main__":
    main()
