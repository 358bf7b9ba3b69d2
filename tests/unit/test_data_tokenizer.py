"""Tokenizers of model folders: ids, special tokens, offsets, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatune.data import load_tokenizer
from megatune.errors import CheckpointError
from tests.helpers.datasets import SMOLLM2_TEMPLATE, tokenizer_folder, tokenizer_with

TEXTS = [
    "The cat sleeps in the barn.",
    "  two  spaces\n\n",
    "é 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join(f"the quick brown fox {i} jumps over the lazy dog {i * i}" for i in range(300))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "m"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "m.model"


def test_ids_and_text_are_those_of_the_library(folder: Path) -> None:
    import tokenizers

    ours, theirs = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text), skip_special=False) == text
    assert ours.decode(ours.encode("<|im_start|>hi<|im_end|>")) == "hi"
    assert [one.ids for one in ours.encode_batch(TEXTS)] == [ours.encode(text) for text in TEXTS]


def test_special_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.vocab_size == 320
    assert tokenizer.chat_template == SMOLLM2_TEMPLATE
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= tokenizer.special_texts
    assert tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.piece(2) == "<|im_end|>"


def test_every_stop_id_of_the_generation_config_is_known(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_tokenizer(tmp_path / "t").stop_ids == (2, 0)


def test_eos_from_the_model_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, eos_token=None, pad_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 0, (0,))


def test_special_tokens_from_the_special_tokens_map(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, bos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    assert load_tokenizer(tmp_path).bos_id == 0


def test_offsets_are_characters_and_not_trimmed(folder: Path, tmp_path: Path) -> None:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    shutil.copytree(folder, tmp_path / "t")
    fast.save(str(tmp_path / "t" / "tokenizer.json"))
    text = "é  the <|im_end|> x"
    encoded = load_tokenizer(tmp_path / "t").encode_batch([text])[0]
    tokenizer = load_tokenizer(folder)
    ends = [*encoded.starts[1:], len(text)]
    for token, start, end in zip(encoded.ids, encoded.starts, ends, strict=True):
        if end > start and text[start:end].isascii():
            assert tokenizer.decode([token], skip_special=False) == text[start:end]


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}])
def test_one_bos_and_never_two(folder: Path, tmp_path: Path, config: dict[str, bool]) -> None:
    import tokenizers

    shutil.copytree(folder, tmp_path / "t")
    if not config:  # by the post-processor, as in Llama 3
        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        fast.save(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer = tokenizer_with(load_tokenizer(tmp_path / "t"), tmp_path / "u", None, **config)
    plain = tokenizer.encode("cat")
    assert tokenizer.encode("cat", add_special=True) == [1, *plain]
    assert tokenizer.encode("<|im_start|>cat", add_special=True) == [1, *plain]
    without = tokenizer_with(tokenizer, tmp_path / "v", None, add_bos_token=False)
    assert without.encode("cat", add_special=True) == plain


def test_added_tokens_that_only_the_config_lists(folder: Path, tmp_path: Path) -> None:
    base = load_tokenizer(folder)
    extra = {"320": {"content": "<new>", "special": True}}
    tokenizer = tokenizer_with(base, tmp_path / "a", None, added_tokens_decoder=extra)
    assert tokenizer.encode("x<new>") == [*base.encode("x"), 320]
    assert tokenizer.vocab_size == 321
    assert tokenizer.digest != base.digest
    wrong = {"400": {"content": "<new>", "special": True}}
    with pytest.raises(CheckpointError, match=r"disagree about token '<new>' \(id 400\)"):
        tokenizer_with(base, tmp_path / "b", None, added_tokens_decoder=wrong)


def test_sentencepiece_model_alone(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece

    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "the fox 漢 jumps"
    assert tokenizer.encode(text) == model.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, add_special=True) == [1, *model.encode(text)]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2,))
    # Control symbols in a text are tokens, which SentencePiece by itself does not see.
    ids = tokenizer.encode("<s>the fox</s>")
    assert ids == [1, *model.encode("the fox"), 2]
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.decode(ids, skip_special=False) == "<s>the fox</s>"
    assert tokenizer.encode("<s>the", add_special=True) == [1, *model.encode("the")]


def test_sentencepiece_added_tokens_and_offsets(sentencepiece_file: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    config = {"legacy": False, "added_tokens_decoder": {"330": {"content": "<|end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    text = "fox<|end|>the dog"
    encoded = tokenizer.encode_batch([text])[0]
    assert encoded.ids.count(330) == 1 and encoded.starts[encoded.ids.index(330)] == 3
    assert tokenizer.vocab_size == 331
    # legacy false: no dummy space after a special token.
    after = encoded.ids[encoded.ids.index(330) + 1]
    assert not tokenizer.piece(after).startswith("▁")
    assert encoded.starts[encoded.ids.index(330) + 1] == 10
    assert tokenizer.decode(encoded.ids, skip_special=False) == text


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    from tests.helpers.tiny import make_tokenizer

    fast = make_tokenizer(tmp_path / "whole")
    old = tmp_path / "old"
    old.mkdir()
    fast.model.save(str(old))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(old)
    text = "The cat sleeps in the barn."
    assert tokenizer.encode(text) == fast.encode(text).ids
    assert tokenizer.eos_id == 0


def test_digest_is_stable_and_sees_changes(folder: Path, tmp_path: Path) -> None:
    first = load_tokenizer(folder)
    assert first.digest == load_tokenizer(folder).digest
    shutil.copytree(folder, tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").digest == first.digest
    text = (tmp_path / "t" / "tokenizer.json").read_text()
    (tmp_path / "t" / "tokenizer.json").write_text(text.replace('"special": true', '"special": false', 1))
    assert load_tokenizer(tmp_path / "t").digest != first.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.json",
            '{"version": "1.0", "model": {"type": "BPE", "voc',
            "cannot be read as a tokenizer",
        ),
        ("tokenizer.model", "not a model", "is not a SentencePiece model"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("readme.txt", "nothing here", "holds no tokenizer"),
        ("vocab.json", "{}", "transformers cannot read vocab.json"),
    ],
)
def test_damaged_files_give_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_no_transformers_and_no_torch_on_the_way(folder: Path) -> None:
    code = (
        "import sys; from megatune.data import load_tokenizer, prepare; load_tokenizer(sys.argv[1]).encode('x');"
        "print([name for name in ('transformers', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == "[]"
