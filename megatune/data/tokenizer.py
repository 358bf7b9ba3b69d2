"""Text to tokens and back, without importing transformers where the files allow it.

A model folder is read in this order: `tokenizer.json` (library `tokenizers`), `tokenizer.model` (library
`sentencepiece`), anything else that transformers' AutoTokenizer can turn into a fast tokenizer (no remote code).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatune.errors import CheckpointError

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# ModelProto field 3 (normalizer_spec) with field 3 (add_dummy_prefix) = false. Appended to a serialized model it
# overrides the one inside: protocol buffers merge repeated occurrences of an embedded message.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Encoded:
    """`ids`: token ids; `starts`: for each token, the index of its first character in the text."""

    ids: list[int]
    starts: list[int]


class _Backend(Protocol):
    size: int  # largest token id + 1

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def piece(self, token_id: int) -> str | None: ...


class Tokenizer:
    """The tokenizer of a model folder.

    `bos_id`, `eos_id`, `pad_id`: int or None (pad falls back to eos). `stop_ids`: every id that ends an answer
    (eos_token and generation_config's eos_token_id). `vocab_size`: largest id + 1, added tokens included (a model's
    embedding may have more rows). `chat_template`: Jinja source or None. `special_tokens`: name -> text, the
    variables a template may use. `special_texts`: texts of all special tokens. `digest`: changes when any id of any
    text could change.
    """

    def __init__(self, folder: Path, backend: _Backend, settings: dict[str, Any], identity: bytes):
        self.folder = folder
        self._backend = backend
        self.special_tokens = _special_tokens(settings)
        generation_eos = _id_list(settings["generation"].get("eos_token_id"))
        model_eos = _id_list(settings["model"].get("eos_token_id"))
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        if self.eos_id is None:
            self.eos_id = next(iter(generation_eos + model_eos), None)
        named_pad = self._named_id("pad_token")
        self.pad_id = self.eos_id if named_pad is None else named_pad
        stops = ([] if self.eos_id is None else [self.eos_id]) + (generation_eos or model_eos)
        self.stop_ids = tuple(dict.fromkeys(stops))
        self.vocab_size = backend.size
        self.chat_template: str | None = settings["chat_template"]
        self.special_texts = frozenset(settings["special_texts"]) | frozenset(
            text for text in map(self.piece, self.stop_ids) if text
        )
        self._prefix, self._suffix = self._added_around(settings)
        parts = [identity, json.dumps([self._prefix, self._suffix, self.eos_id]).encode()]
        self.digest = hashlib.sha256(b"\0".join(parts)).hexdigest()

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of `text`. `add_special`: with what the model expects around a text (usually a BOS in front);
        never a second BOS where the text begins with one."""
        ids = self._backend.encode_batch([text])[0].ids
        return self.with_special(ids) if add_special else ids

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character offsets of many texts, nothing added; uses all cores."""
        return self._backend.encode_batch(texts)

    def with_special(self, ids: list[int]) -> list[int]:
        """`ids` with the model's prefix and suffix, unless they are already there."""
        prefix = [] if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix
        suffix = [] if self._suffix and ids[-len(self._suffix) :] == self._suffix else self._suffix
        return [*prefix, *ids, *suffix]

    @property
    def prefix_ids(self) -> list[int]:
        """What the model expects in front of a text: [bos_id] or []."""
        return list(self._prefix)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return self._backend.decode(ids, skip_special)

    def token_id(self, token: str) -> int | None:
        """Id of one token by its text, None where there is no such token."""
        return self._backend.token_id(token)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (not decoded text)."""
        return self._backend.piece(token_id)

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_id(text)

    def _added_around(self, settings: dict[str, Any]) -> tuple[list[int], list[int]]:
        prefix, suffix = settings["added_around"]
        wants_bos, wants_eos = (settings["tokenizer"].get(f"add_{name}_token") for name in ("bos", "eos"))
        if wants_bos is not None and self.bos_id is not None:
            prefix = [self.bos_id] if wants_bos else [token for token in prefix if token != self.bos_id]
        if wants_eos is not None and self.eos_id is not None:
            suffix = [self.eos_id] if wants_eos else [token for token in suffix if token != self.eos_id]
        return prefix, suffix


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model folder. CheckpointError where there is none or its files are damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder with a tokenizer: set model.path to a model folder")
    settings = _read_settings(folder)
    if (folder / "tokenizer.json").exists():
        return _load_fast(folder, settings)
    for name in _SENTENCEPIECE_FILES:
        if (folder / name).exists():
            return _load_sentencepiece(folder, folder / name, settings)
    return _load_with_transformers(folder, settings)


def _load_fast(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    import tokenizers

    path = folder / "tokenizer.json"
    data = path.read_bytes()
    try:
        fast = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer ({error}): download the model folder again"
        ) from error
    return _from_fast(folder, fast, settings, data)


def _from_fast(folder: Path, fast: Any, settings: dict[str, Any], identity: bytes) -> Tokenizer:
    _add_missing_tokens(folder, fast, settings["tokenizer"])
    settings["added_around"] = _take_post_processor(fast)
    settings["special_texts"] = [t.content for t in fast.get_added_tokens_decoder().values() if t.special]
    added = json.dumps(settings["tokenizer"].get("added_tokens_decoder"), sort_keys=True)
    return Tokenizer(folder, _FastBackend(fast), settings, b"fast" + identity + added.encode())


def _take_post_processor(fast: Any) -> tuple[list[int], list[int]]:
    """What the post-processor adds (before, after) a text; it is removed, because it also trims offsets."""
    import tokenizers

    fast.no_truncation()
    fast.no_padding()
    plain = fast.encode("a", add_special_tokens=False).ids
    full = fast.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
    fast.post_processor = tokenizers.processors.Sequence([])
    return full[:start], full[start + len(plain) :]


def _add_missing_tokens(folder: Path, fast: Any, settings: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json lists, under the ids it gives them."""
    import tokenizers

    listed = settings.get("added_tokens_decoder") or {}
    for token_id, entry in sorted((int(key), value) for key, value in listed.items()):
        if fast.token_to_id(entry["content"]) is not None:
            continue
        flags = {
            key: entry.get(key, False) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        fast.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
        if fast.token_to_id(entry["content"]) != token_id:
            raise CheckpointError(
                f"{folder}: tokenizer.json and tokenizer_config.json disagree about token {entry['content']!r} "
                f"(id {token_id}): download both files from the same revision"
            )


class _FastBackend:
    def __init__(self, fast: Any):
        self._fast = fast
        self.size = max(fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(e.ids, [start for start, _ in e.offsets]) for e in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def piece(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id)


def _load_sentencepiece(folder: Path, path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package sentencepiece: pip install sentencepiece") from error
    data = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        continuing = sentencepiece.SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
    except Exception as error:  # RuntimeError or others, by version
        raise CheckpointError(
            f"{path} is not a SentencePiece model ({error}): download the model folder again"
        ) from error
    config = settings["tokenizer"]
    listed = {int(key): value for key, value in (config.get("added_tokens_decoder") or {}).items()}
    added = {entry["content"]: token_id for token_id, entry in listed.items()}
    special = {entry["content"] for entry in listed.values() if entry.get("special")}
    for token_id in range(model.get_piece_size()):
        if model.is_control(token_id):
            added.setdefault(model.id_to_piece(token_id), token_id)
            special.add(model.id_to_piece(token_id))
    for name, token_id in (
        ("bos_token", model.bos_id()),
        ("eos_token", model.eos_id()),
        ("pad_token", model.pad_id()),
    ):
        if token_id >= 0:
            settings["defaults"].setdefault(name, model.id_to_piece(token_id))
    settings["special_texts"] = special
    settings["added_around"] = ([model.bos_id()], []) if model.bos_id() >= 0 else ([], [])
    # `legacy` is what Hugging Face calls it: a dummy space after every special token, as Llama 2 was trained.
    backend = _SentencePieceBackend(
        model, model if config.get("legacy", True) else continuing, added, special
    )
    identity = (
        b"sentencepiece" + data + json.dumps([listed, config.get("legacy", True)], sort_keys=True).encode()
    )
    return Tokenizer(folder, backend, settings, identity)


class _SentencePieceBackend:
    """SentencePiece does not see control symbols or added tokens in a text: the text is cut at them here.

    `model` encodes the first stretch of a text, `continuing` those after an added token.
    """

    def __init__(self, model: Any, continuing: Any, added: dict[str, int], special: set[str]):
        self._first, self._continuing = model, continuing
        self._added = added
        self._texts = {token_id: text for text, token_id in added.items()}
        self._special_ids = {added[text] for text in special}
        self.size = max([model.get_piece_size() - 1, *added.values()]) + 1
        longest_first = sorted(added, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for number, stretch in enumerate(self._cut.split(text) if self._cut else [text]):
            if number % 2:
                ids.append(self._added[stretch])
                starts.append(position)
            elif stretch:
                pieces = _pieces(self._first if number == 0 else self._continuing, stretch)
                ids += [token_id for token_id, _ in pieces]
                starts += [position + start for _, start in pieces]
            position += len(stretch)
        return Encoded(ids, starts)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        text, run = "", []
        for token_id in [*map(int, ids), None]:
            if token_id is not None and token_id not in self._texts:
                run.append(token_id)
                continue
            if run:
                # Every stretch was encoded with a dummy space where `legacy`; decode removes just that one.
                text += (self._first if not text else self._continuing).decode(run)
                run = []
            if token_id is not None and not (skip_special and token_id in self._special_ids):
                text += self._texts[token_id]
        return text

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id = self._first.piece_to_id(token)
        return (
            None
            if self._first.is_unknown(token_id) and token != self._first.id_to_piece(token_id)
            else token_id
        )

    def piece(self, token_id: int) -> str | None:
        if token_id in self._texts:
            return self._texts[token_id]
        return self._first.id_to_piece(token_id) if 0 <= token_id < self._first.get_piece_size() else None


def _pieces(model: Any, text: str) -> list[tuple[int, int]]:
    """(id, first character) of each piece; the call that gives offsets differs between versions of the library."""
    if hasattr(model, "encode_as_offset_mapping"):  # 0.2.2 and later
        mapping = model.encode_as_offset_mapping(text)
        return [
            (token_id, start) for token_id, (start, _) in zip(mapping["ids"], mapping["offsets"], strict=True)
        ]
    proto = model.encode(text, out_type="immutable_proto")
    return [(piece.id, piece.begin) for piece in proto.pieces]


def _load_with_transformers(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    known = [
        name for name in ("vocab.json", "vocab.txt", "tokenizer_config.json") if (folder / name).exists()
    ]
    if not known:
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model): copy the tokenizer files of the model "
            "into it"
        )
    try:
        from transformers import AutoTokenizer

        slow_or_fast = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        fast = slow_or_fast.backend_tokenizer
        data = fast.to_str().encode()
    except (
        Exception
    ) as error:  # whatever transformers or a missing package raises: the cause is in the message
        raise CheckpointError(
            f"{folder} has no tokenizer.json or tokenizer.model and transformers cannot read {', '.join(known)} "
            f"as a fast tokenizer ({' '.join(str(error).split())[:300]}): save it as tokenizer.json"
        ) from error
    for name, text in slow_or_fast.special_tokens_map.items():
        if isinstance(text, str):
            settings["defaults"].setdefault(name, text)
    return _from_fast(folder, fast, settings, data)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The JSON files around a tokenizer. `defaults`: special tokens used where no file names them."""
    config = _read_json(folder / "tokenizer_config.json")
    return {
        "tokenizer": config,
        "map": _read_json(folder / "special_tokens_map.json"),
        "generation": _read_json(folder / "generation_config.json"),
        "model": _read_json(folder / "config.json"),
        "chat_template": _chat_template(folder, config),
        "defaults": {},
        "special_texts": [],
        "added_around": ([], []),
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): download the model folder again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object: download the model folder again")
    return value


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = dict(settings["defaults"])
    for source in (settings["map"], settings["tokenizer"]):
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _id_list(value: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    return [value] if isinstance(value, int) else [item for item in value if isinstance(item, int)]
