"""Answers of the model to held-out prompts, shown before and after training."""

from __future__ import annotations

from megatune.config.schema import Config
from megatune.data import prompts
from megatune.data.template import encode_prompt, load_template
from megatune.data.tokenizer import Tokenizer
from megatune.models.generate import generate
from megatune.parallel import World
from megatune.parallel.pipeline import Pipeline


def answers(pipeline: Pipeline, tokenizer: Tokenizer, config: Config, world: World) -> list[dict[str, str]]:
    """{prompt, reference, answer} for the first `train.samples` held-out rows, greedy.

    Every process takes part (each holds a part of the model); all get the same text.
    """
    model = pipeline.model
    found = []
    template = load_template(tokenizer, config.data.chat_template)
    was_training = model.training
    model.eval()
    for messages, reference in prompts(config, config.train.samples):
        ids = encode_prompt(messages, tokenizer, template)
        tokens = generate(
            model,
            ids,
            max_new_tokens=config.train.sample_tokens,
            stop_ids=tokenizer.stop_ids,
            device=world.device,
            forward=pipeline.logits,
        )
        answer = tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])
        found.append({"prompt": messages[-1]["content"], "reference": reference, "answer": answer})
    model.train(was_training)
    return found
