"""Answers of the model to held-out prompts, shown before and after training."""

from __future__ import annotations

from megatune.config.schema import Config
from megatune.data import prompts
from megatune.data.template import encode_prompt, load_template
from megatune.data.tokenizer import Tokenizer
from megatune.models import Decoder
from megatune.models.generate import generate
from megatune.parallel import World


def answers(model: Decoder, tokenizer: Tokenizer, config: Config, world: World) -> list[dict[str, str]]:
    """{prompt, reference, answer} for the first `train.samples` held-out rows, greedy.

    Every process takes part (under ZeRO-3 each token gathers weights from all); all get the same text.
    """
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
        )
        answer = tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])
        found.append({"prompt": messages[-1]["content"], "reference": reference, "answer": answer})
    model.train(was_training)
    return found
