"""A training step of layers of Llama-3-8B's shape on one GPU: bf16 against `model.fp8`.

    python -m benchmarks.fp8_step [--layers 4] [--micro-batches 2] [--tokens 8192] [--steps 5] [--out FILE]

Full tuning with fp32 masters, documents of 2,048 tokens, a small vocabulary so that the layers are the step.
`limit`: the step's matrix products alone, in bf16, at the rate a large product reaches here.
"""

from __future__ import annotations

import argparse
import gc

import torch

from benchmarks.common import batch_of, report, row, time_step, trainer
from benchmarks.one_gpu import LLAMA_1B, matrix_rate, settings
from megatune import models, ops
from megatune.config.schema import Config
from megatune.data.batch import Batch

DOCUMENT, VOCABULARY = 2048, 8192
SHAPE = LLAMA_1B | {
    "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def batches_of(count: int, tokens: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        documents = [
            torch.randint(0, VOCABULARY, (DOCUMENT,), generator=generator).tolist()
            for _ in range(tokens // DOCUMENT)
        ]
        found.append(batch_of(documents, [[True] * DOCUMENT for _ in documents]))
    return found


def step_of(fp8: str, spec: models.DecoderSpec, batches: list[Batch], steps: int) -> dict:
    """The row of one setting of `model.fp8`; "" for bf16."""
    base = settings("full", False, {}).model_dump()
    config = Config.model_validate(base | {"model": base["model"] | ({"fp8": fp8} if fp8 else {})})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = trainer(config, spec, torch.bfloat16, lambda weights: models.fill_random(weights, spec, 0))
    here = [batch.to(torch.device("cuda")) for batch in batches]
    scored = sum(len(batch.targets.labels) for batch in here)
    first = run.step(here, scored).loss
    seconds = time_step(lambda: run.step(here, scored), 2, steps)
    last = run.step(here, scored).loss
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    tokens = sum(len(batch.tokens) for batch in batches)
    return row(
        fp8 or "bf16", seconds, tokens, first_loss=round(first, 4), last_loss=round(last, 4), gib=memory
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    shape = SHAPE | {"num_hidden_layers": options.layers}
    spec = models.family_for(shape).spec(shape)
    batches = batches_of(options.micro_batches, options.tokens)
    tokens = sum(len(batch.tokens) for batch in batches)
    rate = matrix_rate()
    ideal = models.flops_per_token(spec, DOCUMENT) * tokens / rate
    rows = [row("limit: matrix products in bf16 at this GPU's rate", [ideal], tokens)]
    rows += [step_of(fp8, spec, batches, options.steps) for fp8 in ("", *ops.fp8_products())]
    bf16 = rows[1]["tokens_per_second"]
    for one in rows:
        one["over_bf16"] = round(one["tokens_per_second"] / bf16, 3)
    facts = {"layers": options.layers, "tokens": tokens, "bf16_tflops": round(rate / 1e12, 1)}
    report("fp8_step", rows, facts, options.out)


if __name__ == "__main__":
    main()
