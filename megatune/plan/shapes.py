"""The shape of a model without its weights: a folder with a config.json, or one of the shapes that come with megatune.

A shape is the config.json of a published model, in `shapes/`, under the name of that model.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from megatune.errors import ConfigError
from megatune.models import DecoderSpec, family_for

# Names of models on the hub begin with these: a tuned variant has the same shape.
_KNOWN = {
    "meta-llama/Llama-3.1-405B": "llama-3.1-405b",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
}


def shape_of(path: str) -> DecoderSpec:
    """The spec of `model.path`. ConfigError, naming what is known, where only its weights would tell."""
    described = Path(path) / "config.json"
    if described.is_file():
        text, where = described.read_text("utf-8"), str(described)
    else:
        found = [name for prefix, name in _KNOWN.items() if path.startswith(prefix) or path == name]
        if not found:
            raise ConfigError(
                f"model.path: {path} is no folder with a config.json; give one (it needs no weights), or one of "
                f"{', '.join((*_KNOWN, *_KNOWN.values()))}"
            )
        where = f"{found[0]}.json"
        text = files("megatune.plan").joinpath("shapes", where).read_text("utf-8")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error}); restore it") from error
    return family_for(settings).spec(settings)
