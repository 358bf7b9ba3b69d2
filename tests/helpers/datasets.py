"""Data files and configurations for tests of the data room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatune.config.schema import Config
from megatune.data import Tokenizer, load_tokenizer
from tests.helpers.tiny import make_tokenizer

# The template of SmolLM2-135M-Instruct, character for character (it has real line breaks inside its strings).
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_folder(folder: Path, template: str | None = SMOLLM2_TEMPLATE, **config: Any) -> Path:
    """A byte-level BPE tokenizer with ChatML's special tokens and this template; `config`: further keys."""
    make_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | config
    settings.pop("chat_template")
    if template is not None:
        settings["chat_template"] = template
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def tokenizer_with(base: Tokenizer, folder: Path, template: str | None, **config: Any) -> Tokenizer:
    """The same tokenizer as `base` with another template."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(base.folder / "tokenizer.json", folder)
    settings = json.loads((base.folder / "tokenizer_config.json").read_text()) | config
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a row that is a str or bytes is written as it stands."""
    data = b""
    for row in rows:
        line = (
            row
            if isinstance(row, bytes)
            else row.encode()
            if isinstance(row, str)
            else json.dumps(row).encode()
        )
        data += line + b"\n"
    path.write_bytes(data)
    return path


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row in messages form."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def config(
    folder: Path, train: Path | list[Path], *, train_section: dict[str, Any] | None = None, **data: Any
) -> Config:
    """A configuration over these data; its run folder is `folder`/run."""
    paths = train if isinstance(train, list) else [train]
    sections = {
        "model": {"path": "unused"},
        "data": {"train": [str(path) for path in paths], "seq_length": 64, **data},
        "checkpoint": {"folder": str(folder / "run")},
        "train": train_section or {},
    }
    return Config.model_validate(sections)
