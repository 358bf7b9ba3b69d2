"""From YAML files and `a.b=c` overrides to a checked `Config`, and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatune.config.schema import Config
from megatune.config.yaml_reader import Key, read_yaml, write_yaml
from megatune.errors import ConfigError

MAX_FILES = 50


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, the files it includes, and overrides.

    `include: FILE` or `include: [FILE, ...]` at the top of a file: those files first, in order, then the file's own
    keys. Paths in `include` are relative to the file they stand in; all other paths stay as written (relative to the
    working directory). Mappings merge key by key, anything else is replaced; a mapping whose `type` changes is
    replaced too, so that `method: {type: full}` leaves nothing of an included `lora`.

    `overrides`: `section.key=value` with a YAML value (`optim.lr=1e-4`, `data.train=[a.jsonl, b.jsonl]`); nothing
    after the equals sign means null. They win over the files, later ones over earlier ones.

    Raises ConfigError: one sentence for each unknown key, missing key or wrong value, with file and line. Environment
    variables are not expanded.
    """
    path = Path(path)
    sources = _Sources(str(path))
    tree = sources.read(path, ())
    given: dict[str, Any] = {}
    for override in overrides:
        sources.override(given, override, tree)
    _merge(tree, given)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        from megatune.config.explain import explain

        raise ConfigError(explain(error, tree, sources.where)) from None


def config_as_dict(config: Config) -> dict[str, Any]:
    """All keys with their values, defaults included, as plain JSON-like data."""
    return config.model_dump(mode="json")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal Config."""
    return write_yaml(config_as_dict(config))


def config_digest(config: Config) -> str:
    """SHA-256 of the resolved configuration, in hexadecimal; independent of how and where it was written."""
    text = json.dumps(config_as_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class _Sources:
    """Reads files and overrides, and remembers where each key was set."""

    def __init__(self, main: str) -> None:
        self.main = main
        self.places: dict[Key, str] = {}
        self.files = 0

    def where(self, key: Key) -> str:
        """Where `key` was set; for one that was not, the place of the mapping that should hold it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.main

    def read(self, path: Path, open_files: tuple[Path, ...]) -> dict[str, Any]:
        """The tree of a file with what it includes. `open_files`: those that are including it."""
        name, real = str(path), path.resolve()
        if real in open_files:
            chain = " -> ".join(file.name for file in (*open_files[open_files.index(real) :], real))
            raise ConfigError(f"{name} includes itself ({chain}); remove one `include`")
        self.files += 1
        if self.files > MAX_FILES:
            raise ConfigError(f"{self.main} includes more than {MAX_FILES} files")
        own, lines = read_yaml(_text(path, open_files), name)
        if own is None:
            raise ConfigError(
                f"{name} is empty; a configuration needs at least model.path, data.train and checkpoint.folder"
            )
        if not isinstance(own, dict):
            raise ConfigError(f"{name} must be a mapping of sections (model, data, ...) at its top level")
        tree: dict[str, Any] = {}
        for included in _includes(own.pop("include", None), name):
            file = Path(os.path.normpath(path.parent / included))
            _merge(tree, self.read(file, (*open_files, real)))
        # An empty section (`optim:` with all of its keys commented out) says nothing.
        own = {section: value for section, value in own.items() if value is not None}
        _merge(tree, own)
        self.places |= {key: f"{name}, line {line}" for key, line in lines.items() if key}
        return tree

    def override(self, given: dict[str, Any], text: str, tree: dict[str, Any]) -> None:
        """Add `a.b=value` to the tree `given` of overrides. `tree`: what the files say."""
        dotted, equals, value_text = text.partition("=")
        key = tuple(dotted.strip().split("."))
        if not equals or not all(key):
            raise ConfigError(f"override `{text}` must read section.key=value, for example optim.lr=1e-4")
        if key == ("include",):
            raise ConfigError(f"override `{text}`: include works in files only")
        place = f"override `{text if len(text) <= 80 else text[:77] + '...'}`"
        value, lines = read_yaml(value_text, place)
        held: Any = tree
        for depth, name in enumerate(key[:-1]):
            given = given.setdefault(name, {})
            prefix = key[: depth + 1]
            if not isinstance(given, dict):
                raise ConfigError(
                    f"{place} contradicts {self.places[prefix]}, where `{'.'.join(prefix)}` is a value"
                )
            held = held.get(name) if isinstance(held, dict) else None
            if not isinstance(held, dict):
                self.places[prefix] = place
        given[key[-1]] = value
        self.places |= {(*key, *inner): place for inner in ((), *lines)}


def _text(path: Path, open_files: tuple[Path, ...]) -> str:
    by = f" (included by {open_files[-1]})" if open_files else ""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}{by}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}{by} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}{by} cannot be read: {error.strerror}") from None


def _includes(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"`include` in {name} must be a file name or a list of them")
    return files


def _merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    """Put `top` over `base`, in place."""
    for name, value in top.items():
        old = base.get(name)
        mergeable = isinstance(old, dict) and isinstance(value, dict)
        if mergeable and value.get("type", old.get("type")) == old.get("type"):
            _merge(old, value)
        else:
            base[name] = value
