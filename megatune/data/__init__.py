"""Data: files of rows -> chat template -> tokens and loss mask -> packed sequences -> micro-batches.

    tokenizer = load_tokenizer(model_folder)
    prepare(config, tokenizer, folder)        # in one process: tokenise and pack once, into memory-mapped files
    module = build(config, tokenizer, dp_rank=0, dp_size=1, folder=folder)
    for batch in module.train.step(0): ...    # this process's micro-batches of optimizer step 0

Names are imported on first use: tokenising processes import this package and need no torch.
"""

from importlib import import_module
from typing import Any

# No module may carry the name of something it gives: the import system would put the module in its place.
_HOME = {
    "Batch": "batch",
    "ChatTemplate": "template",
    "DataModule": "loader",
    "EvalLoader": "loader",
    "TokenCache": "cache",
    "Tokenizer": "tokenizer",
    "TrainLoader": "loader",
    "best_fit": "packing",
    "build": "loader",
    "encode_chat": "template",
    "encode_prompt": "template",
    "encoded_samples": "preview",
    "load_template": "template",
    "load_tokenizer": "tokenizer",
    "open_cache": "cache",
    "prepare": "cache_builder",
    "prompts": "preview",
    "show": "preview",
}

__all__ = [
    "Batch",
    "ChatTemplate",
    "DataModule",
    "EvalLoader",
    "TokenCache",
    "Tokenizer",
    "TrainLoader",
    "best_fit",
    "build",
    "encode_chat",
    "encode_prompt",
    "encoded_samples",
    "load_template",
    "load_tokenizer",
    "open_cache",
    "prepare",
    "prompts",
    "show",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
