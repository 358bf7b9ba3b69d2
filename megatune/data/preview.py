"""Looking at data: samples as the model sees them, and held-out prompts to be answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatune.config.schema import Config
from megatune.data.cache_builder import detect_format
from megatune.data.encode import (
    OTHER_SPLIT,
    USED,
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


def samples(config: Config, tokenizer: Tokenizer, count: int) -> Iterator[tuple[str, list[Piece]]]:
    """The first `count` training samples: ("file:line, 57 tokens, 21 learnt", pieces of text in order).

    Tokens are joined into pieces of equal flag before they are decoded, so that characters of several tokens stay
    whole. DataError for a row that cannot be used, unless data.on_error is skip.
    """
    data = config.data
    files = list_files(data.train, "train")
    formats = [detect_format(path, number, data.format, data.on_error) for number, path in enumerate(files)]
    settings = EncodeSettings.from_config(data, "train", formats, template_for(data, formats, tokenizer))
    encoder = Encoder(settings, tokenizer)
    left = count
    for row in _rows(files):
        encoded = encoder.encode([row])
        fate = encoded.fates[0]
        if encoded.errors and data.on_error == "error":
            raise row_error(str(files[row.file]), row, encoded.errors[0])
        if fate == OTHER_SPLIT:
            continue
        title = f"{where(files[row.file], row.line)}: "
        if fate in USED:
            cut = ", truncated" if fate != USED[0] else ""
            title += f"{len(encoded.tokens)} tokens, {int(encoded.mask.sum())} with loss{cut}"
        else:
            title += f"left out ({encoded.errors.get(0) or fate.replace('_', ' ')})"
        yield title, _pieces(tokenizer, encoded.tokens, encoded.mask)
        left -= 1
        if not left:
            return


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


def _rows(files: list[Path]) -> Iterator[RawRow]:
    return (row for number, path in enumerate(files) for row in read_rows(path, number))


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[Piece]:
    borders = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    return [
        (tokenizer.decode(run.tolist(), skip_special=False), bool(flags[0]))
        for run, flags in zip(np.split(tokens, borders), np.split(mask, borders), strict=True)
        if len(run)
    ]
