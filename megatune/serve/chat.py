"""Answers in the terminal: one prompt, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatune.data.tokenizer import Tokenizer, load_tokenizer
from megatune.errors import ConfigError
from megatune.models import CausalLM
from megatune.models.generate import generate
from megatune.serve.load import load_model


def answer(path: str, prompt: str, *, raw: bool, system: str | None, dtype: str, **options: Any) -> None:
    """Print the model's answer to one prompt as it comes."""
    model, tokenizer = _load(path, dtype)
    if raw:
        ids = tokenizer.encode(prompt, add_special=True)
    else:
        ids = _chat_ids(tokenizer, _messages(system, prompt))
    for piece in stream(model, tokenizer, ids, **options):
        print(piece, end="", flush=True)
    print()


def converse(path: str, *, system: str | None, dtype: str, **options: Any) -> None:
    """A conversation until an empty line or the end of the input."""
    model, tokenizer = _load(path, dtype)
    messages = _messages(system)
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        pieces = []
        try:
            for piece in stream(model, tokenizer, _chat_ids(tokenizer, messages), **options):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            pass  # Ctrl-C cuts this answer short; what came so far stays in the conversation
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def stream(
    model: CausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """Pieces of text whose sum is the decoded answer; a character is given once all its bytes have come."""
    found: list[int] = []
    shown = ""
    for token in generate(
        model.decoder,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=tokenizer.stop_ids,
    ):
        found.append(token)
        text = tokenizer.decode(found)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(found)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _load(path: str, dtype: str) -> tuple[CausalLM, Tokenizer]:
    """The model and its tokenizer; an adapter may bring the chat template that it was trained with."""
    model = load_model(path, dtype=dtype)
    tokenizer = load_tokenizer(model.folder.path)
    own = Path(path) / "chat_template.jinja"
    if own.is_file():
        tokenizer.chat_template = own.read_text("utf-8")
    return model, tokenizer


def _messages(system: str | None, user: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + ([{"role": "user", "content": user}] if user is not None else [])


def _chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    from megatune.data.template import encode_prompt

    if not tokenizer.chat_template:
        raise ConfigError("the model's tokenizer has no chat template; use --raw to continue plain text")
    return encode_prompt(messages, tokenizer)
