"""Looking at data: samples as the model sees them, and held-out prompts to be answered."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatune.config.schema import Config
from megatune.data.cache_builder import detect_format
from megatune.data.encode import (
    OTHER_SPLIT,
    USED,
    EncodedRows,
    Encoder,
    EncodeSettings,
    as_chat,
    read_sample,
    row_error,
    template_for,
)
from megatune.data.formats import RowError
from megatune.data.sources import RawRow, list_files, read_rows, where
from megatune.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

Piece = tuple[str, bool]  # text, and whether it is learnt
_LEARNT_STYLE = "bold green"


def encoded_samples(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """(token ids, which of them are learnt) of each training sample, in the order of the files, without a cache.
    DataError for a row that cannot be used, unless data.on_error is skip."""
    for _, encoded in _encoded(config, tokenizer):
        if encoded.fates[0] in USED:
            yield encoded.tokens.tolist(), encoded.mask.tolist()


def samples(config: Config, tokenizer: Tokenizer, count: int) -> Iterator[tuple[str, list[Piece]]]:
    """The first `count` training rows: ("file:line: 57 tokens, 21 with loss", pieces of text in order).

    Tokens are joined into pieces of equal flag before they are decoded, so that characters of several tokens stay
    whole. DataError for a row that cannot be used, unless data.on_error is skip.
    """
    for name, encoded in islice(_encoded(config, tokenizer), count):
        fate = encoded.fates[0]
        if fate in USED:
            cut = ", truncated" if fate != USED[0] else ""
            title = f"{name}: {len(encoded.tokens)} tokens, {int(encoded.mask.sum())} with loss{cut}"
        else:
            title = f"{name}: left out ({encoded.errors.get(0) or fate.replace('_', ' ')})"
        yield title, _pieces(tokenizer, encoded.tokens, encoded.mask)


def show(config: Config, tokenizer: Tokenizer, count: int) -> list[Text]:
    """The first `count` training samples for the console; what is learnt stands out."""
    from rich.text import Text

    texts = []
    for title, pieces in samples(config, tokenizer, count):
        text = Text(f"--- {title}\n", style="")
        for piece, learnt in pieces:
            text.append(piece, _LEARNT_STYLE if learnt else "dim")
        texts.append(text)
    return texts


def prompts(config: Config, count: int) -> list[tuple[list[dict[str, Any]], str]]:
    """(messages up to the last assistant turn, what was said there) of the first `count` held-out rows that are
    conversations; of training rows where nothing is held out. Rows that cannot be read are passed over."""
    data = config.data
    own = [data.eval] if isinstance(data.eval, str) else data.eval
    files = list_files(own or data.train, "eval" if own else "train")
    formats = [detect_format(path, number, data.format, data.on_error) for number, path in enumerate(files)]
    split = "eval" if own or data.eval_fraction else "train"
    settings = EncodeSettings.from_config(data, split, formats, None)
    found: list[tuple[list[dict[str, Any]], str]] = []
    for row in _rows(files):
        try:
            sample = read_sample(row, settings)
        except RowError:
            continue  # `prepare` has reported it
        if sample is None or sample.kind == "text":
            continue
        messages, _ = as_chat(sample, data.system)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        found.append((messages[:last], messages[last]["content"]))
        if len(found) == count:
            break
    return found


def _encoded(config: Config, tokenizer: Tokenizer) -> Iterator[tuple[str, EncodedRows]]:
    """("file:line", tokens) of each training row, one by one."""
    data = config.data
    files = list_files(data.train, "train")
    formats = [detect_format(path, number, data.format, data.on_error) for number, path in enumerate(files)]
    settings = EncodeSettings.from_config(data, "train", formats, template_for(data, formats, tokenizer))
    encoder = Encoder(settings, tokenizer)
    for row in _rows(files):
        encoded = encoder.encode([row])
        if encoded.errors and data.on_error == "error":
            raise row_error(str(files[row.file]), row, encoded.errors[0])
        if encoded.fates[0] != OTHER_SPLIT:
            yield where(files[row.file], row.line), encoded


def _rows(files: list[Path]) -> Iterator[RawRow]:
    return (row for number, path in enumerate(files) for row in read_rows(path, number))


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[Piece]:
    borders = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    return [
        (tokenizer.decode(run.tolist(), skip_special=False), bool(flags[0]))
        for run, flags in zip(np.split(tokens, borders), np.split(mask, borders), strict=True)
        if len(run)
    ]
