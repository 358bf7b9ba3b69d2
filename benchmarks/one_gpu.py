"""A training step on one GPU against transformers + peft: Llama-3.2-1B's shape, random weights, bf16.

    python -m benchmarks.one_gpu [--method lora|full] [--tokens 8192] [--mean-length 0] [--steps 8] [--out FILE]

One packed sequence of `tokens` tokens a step; `mean-length` 0 makes it one document, else documents of about that
length (transformers then gets the same row with position ids and no mask, which it treats as packed). Every token is
scored. Full tuning keeps fp32 masters and computes in bf16 on both sides (autocast for transformers).
`limit`: the step's matrix products alone at the rate a large product reaches here.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.common import batch_of, report, row, synchronize, time_step, trainer
from megatune import models
from megatune.checkpoint.pretrained import init_adapter
from megatune.config.schema import Config
from megatune.parallel.shard import Parts
from megatune.training.precision import can_compile

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def settings(method: str, compile_layers: bool, backend: dict[str, str]) -> Config:
    lora = {"type": "lora", "rank": 16, "alpha": 32.0}
    return Config.model_validate(
        {
            "model": {"path": "random"},
            "method": lora if method == "lora" else {"type": "full"},
            "data": {"train": ["none"], "seq_length": 8192},
            "train": {"steps": 1000, "compile": compile_layers},
            "optim": {"lr": 1e-5},
            "checkpoint": {"folder": "none"},
            "ops": {"backend": backend},
        }
    )


def documents(tokens: int, mean_length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = (
            tokens
            if not mean_length
            else int(torch.randint(mean_length // 2, mean_length * 3 // 2, (1,), generator=generator))
        )
        lengths.append(min(length, tokens - sum(lengths)))
    return [torch.randint(0, 128256, (n,), generator=generator).tolist() for n in lengths]


def ours(method: str, batch, steps: int, compile_layers: bool) -> tuple[float, list[float], float]:
    config = settings(method, compile_layers, {})
    spec = models.family_for(LLAMA_1B).spec(LLAMA_1B)

    def fill(weights: dict[str, Parts]) -> None:
        models.fill_random(weights, spec, 0)
        for name, parts in weights.items():
            if ".adapter." in name:
                init_adapter(name, parts, 0)

    torch.cuda.reset_peak_memory_stats()
    run = trainer(config, spec, torch.bfloat16, fill)
    batch = batch.to(torch.device("cuda"))
    scored = len(batch.targets.labels)
    first = run.step([batch], scored).loss
    seconds = time_step(lambda: run.step([batch], scored), 3, steps)
    return first, seconds, torch.cuda.max_memory_allocated() / 2**30


def theirs(method: str, docs: list[list[int]], steps: int) -> tuple[float, list[float], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in LLAMA_1B.items() if k not in ("architectures", "model_type")})
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if method == "lora" else torch.float32)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    flat = [t for d in docs for t in d]
    labels = [t if i else -100 for d in docs for i, t in enumerate(d)]
    inputs = {
        "input_ids": torch.tensor([flat], device="cuda"),
        "position_ids": torch.tensor([[i for d in docs for i in range(len(d))]], device="cuda"),
        "labels": torch.tensor([labels], device="cuda"),
    }

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=method == "full"):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first = step()
    seconds = time_step(step, 3, steps)
    return first, seconds, torch.cuda.max_memory_allocated() / 2**30


def matrix_rate() -> float:
    """FLOP/s of a large bf16 product here."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--mean-length", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out")
    args = parser.parse_args()
    docs = documents(args.tokens, args.mean_length)
    batch = batch_of(docs, [[True] * len(d) for d in docs])
    spec = models.family_for(LLAMA_1B).spec(LLAMA_1B)
    rate = matrix_rate()
    length = args.mean_length or args.tokens
    flops = models.flops_per_token(spec, length, frozen=args.method == "lora")
    rows = [row("limit: matrix products at this GPU's rate", [flops * args.tokens / rate], args.tokens)]
    for compiled in (False, True) if can_compile() else (False,):
        loss, seconds, memory = ours(args.method, batch, args.steps, compiled)
        name = f"megatune{', layers compiled' if compiled else ''}"
        rows.append(row(name, seconds, args.tokens, first_loss=round(loss, 4), gib=round(memory, 1)))
        torch.cuda.empty_cache()
    loss, seconds, memory = theirs(args.method, docs, args.steps)
    rows.append(
        row(
            "transformers + peft" if args.method == "lora" else "transformers, autocast",
            seconds,
            args.tokens,
            first_loss=round(loss, 4),
            gib=round(memory, 1),
        )
    )
    facts = {
        "method": args.method,
        "tokens": args.tokens,
        "documents": len(docs),
        "bf16_tflops": round(rate / 1e12, 1),
    }
    facts["megatune_over_transformers"] = round(
        rows[1]["tokens_per_second"] / rows[-1]["tokens_per_second"], 2
    )
    report(f"one_gpu_{args.method}_{args.mean_length or 'one'}", rows, facts, args.out)


if __name__ == "__main__":
    main()
