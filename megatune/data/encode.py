"""Raw rows to tokens and loss masks, many at a time; runs in this process and in the tokenising processes alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np

from megatune.config.schema import DataConfig
from megatune.data.formats import RowError, Sample, parse
from megatune.data.sources import RawRow, parse_json_row, where
from megatune.data.template import ChatTemplate, Span, chat_spans, load_template, token_mask
from megatune.data.tokenizer import Tokenizer
from megatune.errors import DataError

# What can become of a row, beside the kinds of RowError.
KEPT = "kept"
TRUNCATED = "truncated"
TOO_LONG = "too_long"
NOTHING_LEARNT = "nothing_learnt"
OTHER_SPLIT = "other_split"
USED = (KEPT, TRUNCATED)


@dataclass(frozen=True)
class EncodeSettings:
    """Everything beside the tokenizer that decides the tokens of a row. `formats`: one for each file. `held_out`:
    share of rows (by content) that belong to the evaluation; `split`: which side is wanted. `today`: ISO time for
    templates that print the date. JSON-able: it is sent to the tokenising processes."""

    formats: tuple[str, ...]
    split: str
    seq_length: int
    train_on: str
    too_long: str
    system: str | None
    held_out: float
    template_source: str | None
    template_name: str
    today: str

    @classmethod
    def from_config(
        cls, data: DataConfig, split: str, formats: Sequence[str], template: ChatTemplate | None
    ) -> EncodeSettings:
        return cls(
            formats=tuple(formats),
            split=split,
            seq_length=data.seq_length,
            train_on=data.train_on,
            too_long=data.too_long,
            system=data.system,
            held_out=0.0 if data.eval else data.eval_fraction,
            template_source=template.source if template else None,
            template_name=template.name if template else "",
            today=(template.today if template else datetime.now()).isoformat(),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EncodedRows:
    """`fates`: for each row what became of it; `errors`: row number in this chunk -> message; `lengths`: tokens of
    each row that is used, else 0; `tokens`: uint32 [sum of lengths]; `mask`: bool, the same shape, True where a token
    is learnt (never the first of a row)."""

    fates: list[str]
    errors: dict[int, str]
    lengths: list[int]
    tokens: np.ndarray
    mask: np.ndarray


class Encoder:
    """Rows to tokens under fixed settings."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer):
        self.settings, self.tokenizer = settings, tokenizer
        self.template: ChatTemplate | None = None
        if settings.template_source is not None:
            self.template = ChatTemplate(
                settings.template_source,
                settings.template_name,
                tokenizer.special_tokens,
                datetime.fromisoformat(settings.today),
            )

    @property
    def _from_fraction(self) -> bool:
        return self.settings.split == "eval" and self.settings.held_out > 0

    def encode(self, rows: Sequence[RawRow]) -> EncodedRows:
        """All rows of a chunk. What is wrong with a row is its fate and message, never an exception."""
        fates, errors = [KEPT] * len(rows), {}
        texts: list[str] = []
        spans: list[list[Span]] = []
        samples: list[tuple[int, Sample]] = []
        for number, row in enumerate(rows):
            try:
                try:
                    sample = read_sample(row, self.settings)
                except RowError:
                    if not self._from_fraction:
                        raise
                    sample = None  # a row that cannot be read belongs to the training set, which reports it
                if sample is None:
                    fates[number] = OTHER_SPLIT
                    continue
                text, span = self._text_and_spans(sample)
                _check_unicode(text)
            except RowError as error:
                fates[number], errors[number] = error.kind, str(error)
                continue
            texts.append(text)
            spans.append(span)
            samples.append((number, sample))
        lengths = [0] * len(rows)
        tokens, masks = [], []
        encoded = self.tokenizer.encode_batch(texts)
        for (number, sample), one, span in zip(samples, encoded, spans, strict=True):
            ids, mask = self._finish(sample, one.ids, token_mask(one.starts, span))
            ids, mask, fate, message = self._fit(ids, mask)
            fates[number] = fate
            if message:
                errors[number] = message
            if fate in USED:
                lengths[number] = len(ids)
                tokens.append(ids)
                masks.append(mask)
        empty = [np.zeros(0)]
        return EncodedRows(
            fates,
            errors,
            lengths,
            np.concatenate(tokens or empty).astype(np.uint32),
            np.concatenate(masks or empty).astype(bool),
        )

    def _text_and_spans(self, sample: Sample) -> tuple[str, list[Span]]:
        if sample.kind == "text":
            return sample.completion, [(0, len(sample.completion))]
        if self.template is None and sample.kind == "chat":
            raise RowError(
                "template", "the tokenizer has no chat template; set data.chat_template to a Jinja file"
            )
        if self.template is None:
            text = sample.prompt + sample.completion
            return text, [(0 if self.settings.train_on == "all" else len(sample.prompt), len(text))]
        messages, weights = as_chat(sample, self.settings.system)
        return chat_spans(
            self.template,
            messages,
            weights,
            sample.tools,
            self.settings.train_on,
            self.tokenizer.special_texts,
        )

    def _finish(self, sample: Sample, ids: list[int], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """BOS in front and EOS behind, where no chat template does it."""
        if sample.kind == "text" or (sample.kind == "completion" and self.template is None):
            prefix = self.tokenizer.prefix_ids
            if ids[: len(prefix)] == prefix:
                prefix = []
            eos = self.tokenizer.eos_id
            suffix = [] if eos is None or (ids and ids[-1] == eos) else [eos]
            ids = [*prefix, *ids, *suffix]
            mask = np.concatenate([np.zeros(len(prefix), bool), mask, np.ones(len(suffix), bool)])
        mask[:1] = False  # nothing comes before the first token that could foretell it
        return np.asarray(ids, dtype=np.uint32), mask

    def _fit(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, str, str]:
        """The sample under the limit of seq_length, its fate, and a message where that is an error."""
        limit, policy = self.settings.seq_length, self.settings.too_long
        fate, message = KEPT, ""
        if len(ids) > limit:
            if policy == "error":
                message = (
                    f"the sample has {len(ids)} tokens, data.seq_length is {limit}; raise it or set data.too_long to "
                    "truncate or drop"
                )
            if policy != "truncate":
                return ids, mask, TOO_LONG, message
            ids, mask, fate = ids[:limit], mask[:limit], TRUNCATED
        if not mask.any():
            fate = NOTHING_LEARNT
        return ids, mask, fate, message


def read_sample(row: RawRow, settings: EncodeSettings) -> Sample | None:
    """The parsed row, None where it belongs to the other split. RowError for a row that cannot be used."""
    if isinstance(row.value, RowError):
        raise row.value
    value = parse_json_row(row.value) if isinstance(row.value, bytes) else row.value
    sample = parse(value, settings.formats[row.file])
    if settings.held_out and (share_of(sample) < settings.held_out) != (settings.split == "eval"):
        return None
    return sample


def as_chat(sample: Sample, system: str | None) -> tuple[list[dict[str, Any]], list[int]]:
    """Messages and weights of a conversation or completion as a template gets them. `system`: for samples that have
    no system message."""
    messages, weights = list(sample.messages), list(sample.weights)
    if sample.kind == "completion":
        messages = [
            {"role": "user", "content": sample.prompt},
            {"role": "assistant", "content": sample.completion},
        ]
        weights = [1, 1]
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, 1)
    return messages, weights


def template_for(data: DataConfig, formats: Sequence[str], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that these formats need. Texts need none; prompts and completions go without where the
    tokenizer has none (a base model), and are then simply joined. ConfigError where chats have none."""
    kinds = set(formats) - {"text"}
    optional = kinds == {"prompt_completion"} and not tokenizer.chat_template and data.chat_template is None
    return load_template(tokenizer, data.chat_template) if kinds and not optional else None


def share_of(sample: Sample) -> float:
    """A number in [0, 1) that depends on the sample's content only; rows below data.eval_fraction are held out."""
    return int.from_bytes(hashlib.blake2b(sample.content_bytes(), digest_size=8).digest()) / 2**64


def row_error(path: str, row: RawRow, message: str) -> DataError:
    """The error that a user sees for a row."""
    return DataError(f"{where(path, row.line)}: {message}")


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("encoding", "an unpaired surrogate (\\ud800 to \\udfff) is no character") from error
