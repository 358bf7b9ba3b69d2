"""The configuration of a run: schema, loading, writing. Imported on first use, as pydantic is slow to import."""

from __future__ import annotations

from typing import Any

_LAZY = {
    "Config": "megatune.config.schema",
    "config_as_dict": "megatune.config.loader",
    "config_digest": "megatune.config.loader",
    "dump_config": "megatune.config.loader",
    "load_config": "megatune.config.loader",
}

__all__ = ["Config", "config_as_dict", "config_digest", "dump_config", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatune.config' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
