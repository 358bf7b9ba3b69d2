"""The token cache: what is in it, when it is made anew, what is counted, what is refused."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatune.config.schema import Config
from megatune.data import (
    TokenCache,
    Tokenizer,
    encode_chat,
    encoded_samples,
    load_tokenizer,
    open_cache,
    prepare,
    prompts,
    show,
)
from megatune.data import cache_builder as builder
from megatune.data.cache import cache_root
from megatune.errors import ConfigError, DataError
from tests.helpers.datasets import chat, config, tokenizer_folder, tokenizer_with, write_lines
from tests.helpers.tiny import CHATML, tiny_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML))


def made(settings: Config, tokenizer: Tokenizer, split: str = "train", **more: Any) -> TokenCache:
    prepare(settings, tokenizer, **more)
    cache = open_cache(settings, tokenizer, split)
    assert cache is not None
    return cache


def contents(cache: TokenCache) -> list[tuple[list[int], list[bool]]]:
    samples = [cache.sample(number) for number in range(cache.num_samples)]
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in samples]


def entries(settings: Config) -> list[str]:
    return sorted(path.name for path in cache_root(settings).iterdir() if path.is_dir())


def test_samples_are_those_of_encode_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = tiny_rows(40)
    cache = made(config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), seq_length=96), tokenizer)
    assert contents(cache) == [encode_chat(row["messages"], tokenizer) for row in rows]
    assert list(
        encoded_samples(config(tmp_path, tmp_path / "a.jsonl", seq_length=96), tokenizer)
    ) == contents(cache)
    assert cache.tokens.dtype == np.uint16
    assert cache.source(7) == f"{tmp_path / 'a.jsonl'}:8"
    assert cache.counts == {"kept": 40}
    # Every sample stands in one sequence, none of them is too long, and their totals are right.
    members = [cache.samples_of(number) for number in range(cache.num_sequences)]
    assert sorted(chain(*members)) == list(range(40))
    for number, samples in enumerate(members):
        assert sum(len(cache.sample(s)[0]) for s in samples) == cache.sequence_tokens[number] <= 96
        assert sum(cache.sample(s)[1].sum() for s in samples) == cache.sequence_targets[number] > 0
    assert "40 samples" in cache.describe() and "with loss" in cache.describe()


def test_large_vocabularies_and_no_packing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wide = load_tokenizer(tokenizer.folder)
    wide.vocab_size = 70_000
    rows = tiny_rows(5)
    cache = made(
        config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), seq_length=96, packing=False), wide
    )
    assert cache.tokens.dtype == np.uint32
    assert contents(cache) == [encode_chat(row["messages"], wide) for row in rows]
    assert [cache.samples_of(number) for number in range(5)] == [[0], [1], [2], [3], [4]]


def test_a_warm_start_reads_and_writes_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", tiny_rows(40))
    os.utime(path, (1e9, 1e9))
    settings = config(tmp_path, path)
    made(settings, tokenizer)
    monkeypatch.setattr("megatune.data.cache._digest", None)
    monkeypatch.setattr(builder, "_build", None)
    prepare(settings, tokenizer)
    assert open_cache(settings, tokenizer, "train").num_samples == 40


def test_what_makes_another_entry(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    first = made(config(tmp_path, path), tokenizer)
    os.utime(path, (2e9, 2e9))  # another time, the same content
    assert made(config(tmp_path, path), tokenizer).entry == first.entry
    assert made(config(tmp_path, path, on_error="skip"), tokenizer).entry != first.entry
    assert made(config(tmp_path, path, system="Hi."), tokenizer).entry != first.entry
    other = tokenizer_with(tokenizer, tmp_path / "t", "{# x #}" + CHATML)
    assert made(config(tmp_path, path), other).entry != first.entry
    # Another content of the same size, within the same instant.
    write_lines(path, [chat("a", "b"), chat("c", "e")])
    second = made(config(tmp_path, path), tokenizer)
    assert second.entry != first.entry and second.key != first.key
    assert contents(second) != contents(first)


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "sequence_targets.bin", "index.json"])
def test_damage_is_seen_and_mended(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", tiny_rows(20)))
    cache = made(settings, tokenizer)
    whole, broken = contents(cache), cache.entry / name
    broken.write_bytes(broken.read_bytes()[:-3])
    assert open_cache(settings, tokenizer, "train") is None
    assert contents(made(settings, tokenizer)) == whole
    broken.unlink()
    assert open_cache(settings, tokenizer, "train") is None
    assert contents(made(settings, tokenizer)) == whole


def test_an_interrupted_build_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", tiny_rows(20)))

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings, tokenizer, on_progress=interrupt)
    assert entries(settings) == []
    # Of a process that was killed something stays; the next one removes it.
    host = os.uname().nodename
    (cache_root(settings) / f"tmp-train-0-{host}-999999999").mkdir()
    (cache_root(settings) / f"tmp-train-0-{host}-{os.getppid()}").mkdir()
    made(settings, tokenizer)
    assert [name for name in entries(settings) if name.startswith("tmp")] == [
        f"tmp-train-0-{host}-{os.getppid()}"
    ]


BAD_ROWS = [
    ('{"messages": [', "json", r"a.jsonl:2: not valid JSON"),
    (b'{"text": "\xff"}', "encoding", r"a.jsonl:2: not UTF-8"),
    ("[1]", "type", r"a.jsonl:2: a row must be a JSON object"),
    ({"messages": "x"}, "type", r"a.jsonl:2: messages must be a list"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "role", r"a.jsonl:2: messages\[0\].role is 'bot'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no_assistant", r"a.jsonl:2: no assistant turn"),
    (chat("boom", "x"), "template", r"a.jsonl:2: chat template .* refuses the row: no booms"),
    (
        {"messages": [{"role": "assistant", "content": "x"}]},
        "no_prompt",
        r"a.jsonl:2: the conversation begins with",
    ),
    (chat("a", "\ud800"), "encoding", r"a.jsonl:2: an unpaired surrogate"),
]


@pytest.fixture(scope="module")
def fussy(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template = "{% if messages[0].content == 'boom' %}{{ raise_exception('no booms') }}{% endif %}" + CHATML
    return tokenizer_with(tokenizer, tmp_path_factory.mktemp("fussy"), template)


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_ROWS)
def test_a_bad_row_stops_with_file_and_line(
    fussy: Tokenizer, tmp_path: Path, bad: Any, kind: str, message: str
) -> None:
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", [chat("a", "b"), bad, chat("c", "d")]))
    with pytest.raises(DataError, match=message) as raised:
        prepare(settings, fussy)
    assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)
    assert entries(settings) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_rows_are_skipped_and_counted(
    fussy: Tokenizer, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_ROWS_ALONE", 1)
    monkeypatch.setattr(builder, "_CHUNK_ROWS", 3)
    rows = [chat("a", "b"), *(bad for bad, _, _ in BAD_ROWS), chat("c", "d")]
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), on_error="skip")
    cache = made(settings, fussy, processes=processes)
    assert cache.counts == {"kept": 2, **Counter(kind for _, kind, _ in BAD_ROWS)}
    assert cache.source(1).endswith(f":{len(rows)}")
    assert "2 left out (encoding)" in cache.describe() and "1 left out (no assistant)" in cache.describe()


def test_several_processes_make_the_same_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_ROWS_ALONE", 20)
    monkeypatch.setattr(builder, "_CHUNK_ROWS", 10)
    rows = tiny_rows(150)
    lines = write_lines(tmp_path / "a.jsonl", rows[:100])
    array = tmp_path / "b.json"
    array.write_text(json.dumps(rows[100:]))
    settings = config(tmp_path, [lines, array], seq_length=96)
    reports: list[tuple[int, int]] = []
    cache = made(settings, tokenizer, processes=2, on_progress=lambda *now: reports.append(now))
    assert contents(cache) == [encode_chat(row["messages"], tokenizer) for row in rows]
    total = lines.stat().st_size + array.stat().st_size
    assert reports == sorted(reports) and reports[-1] == (total, total)
    index = (cache.entry / "mask.bin").read_bytes()
    alone = config(tmp_path / "alone", [lines, array], seq_length=96)
    assert (made(alone, tokenizer, processes=1).entry / "mask.bin").read_bytes() == index


def test_an_error_in_another_process_names_the_first_bad_row(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_ROWS_ALONE", 10)
    monkeypatch.setattr(builder, "_CHUNK_ROWS", 10)
    rows: list[Any] = tiny_rows(100)
    rows[57] = rows[90] = {"messages": []}
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), seq_length=96)
    with pytest.raises(DataError, match=r"a.jsonl:58: no assistant turn"):
        prepare(settings, tokenizer, processes=2)


def test_a_process_that_dies_is_reported(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_ROWS_ALONE", 10)
    monkeypatch.setattr(builder, "_CHUNK_ROWS", 10)
    gone = tokenizer_with(tokenizer, tmp_path / "gone", CHATML)
    (tmp_path / "gone" / "tokenizer.json").write_text("{")
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", tiny_rows(50)), seq_length=96)
    with pytest.raises(DataError, match="a tokenising process ended with exit code 1"):
        prepare(settings, gone, processes=2)


def test_too_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [chat("a", "word " * 200), chat("word " * 200, "b"), chat("a", "b")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    whole = [encode_chat(row["messages"], tokenizer) for row in rows]
    cache = made(config(tmp_path, path), tokenizer)
    assert cache.counts == {"truncated": 1, "nothing_learnt": 1, "kept": 1}
    assert contents(cache) == [(whole[0][0][:64], whole[0][1][:64]), whole[2]]
    assert "1 truncated" in cache.describe() and "1 left out (nothing learnt)" in cache.describe()
    dropped = made(config(tmp_path, path, too_long="drop"), tokenizer)
    assert dropped.counts == {"too_long": 2, "kept": 1} and contents(dropped) == [whole[2]]
    with pytest.raises(
        DataError, match=rf"a.jsonl:1: the sample has {len(whole[0][0])} tokens, data.seq_length is 64"
    ):
        prepare(config(tmp_path, path, too_long="error"), tokenizer)
    counted = made(config(tmp_path, path, too_long="error", on_error="skip"), tokenizer)
    assert counted.counts == {"too_long": 2, "kept": 1}


def test_train_on_system_and_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = tiny_rows(2, first=1)  # two turns, and one
    path = write_lines(tmp_path / "a.jsonl", rows)
    for train_on in ("assistant", "last", "all"):
        cache = made(config(tmp_path, path, train_on=train_on, seq_length=96), tokenizer)
        expected = [encode_chat(row["messages"], tokenizer, train_on) for row in rows]
        # The first token is never foretold, whatever the template's text begins with.
        assert contents(cache) == [(ids, [False, *mask[1:]]) for ids, mask in expected]
    cache = made(config(tmp_path, path, system="Short.", seq_length=96), tokenizer)
    with_system = [{"role": "system", "content": "Short."}]
    assert contents(cache) == [encode_chat(with_system + row["messages"], tokenizer) for row in rows]


def test_plain_text_and_completions(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = tokenizer_with(tokenizer, tmp_path / "bare", None, add_bos_token=True)
    text = made(config(tmp_path, write_lines(tmp_path / "t.jsonl", [{"text": "The cat."}])), bare)
    ids = bare.encode("The cat.")
    assert contents(text) == [([1, *ids, 2], [False] + [True] * (len(ids) + 1))]
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "The cat", "completion": " sleeps."}])
    plain = made(config(tmp_path, path), bare)
    prompt, completion = bare.encode("The cat"), bare.encode(" sleeps.")
    assert contents(plain) == [
        ([1, *prompt, *completion, 2], [False] * (1 + len(prompt)) + [True] * (len(completion) + 1))
    ]
    templated = made(config(tmp_path, path), tokenizer)
    assert contents(templated) == [encode_chat(chat("The cat", " sleeps.")["messages"], tokenizer)]
    with pytest.raises(ConfigError, match="has no chat template: set data.chat_template"):
        prepare(config(tmp_path, write_lines(tmp_path / "c.jsonl", [chat("a", "b")])), bare)
    listed = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    with pytest.raises(DataError, match=r"l.jsonl:1: the tokenizer has no chat template"):
        prepare(config(tmp_path, write_lines(tmp_path / "l.jsonl", [listed])), bare)


def test_the_same_rows_in_several_formats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    alpaca = {"instruction": "Add:", "input": "1 2", "output": "3", "system": "Be brief."}
    turns = [("system", "Be brief."), ("human", "Add:\n1 2"), ("gpt", "3")]
    sharegpt = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    paths = [write_lines(tmp_path / "a.jsonl", [alpaca]), write_lines(tmp_path / "b.jsonl", [sharegpt])]
    first, second = contents(made(config(tmp_path, paths), tokenizer))
    assert first == second


def test_held_out_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = tiny_rows(200) + tiny_rows(20)  # 20 of them twice
    path = write_lines(tmp_path / "a.jsonl", rows)
    settings = config(tmp_path, path, eval_fraction=0.2, seq_length=96)
    train, held_out = made(settings, tokenizer), made(settings, tokenizer, "eval")
    texts = [{json.dumps(sample) for sample in contents(cache)} for cache in (train, held_out)]
    assert not texts[0] & texts[1] and train.num_samples + held_out.num_samples == 220
    assert 20 < held_out.num_samples < 70
    random.Random(0).shuffle(rows)
    shuffled = config(tmp_path, write_lines(tmp_path / "b.jsonl", rows), eval_fraction=0.2, seq_length=96)
    again = made(shuffled, tokenizer, "eval")
    assert {json.dumps(sample) for sample in contents(again)} == texts[1]


def test_held_out_share_counts_bad_rows_once(fussy: Tokenizer, tmp_path: Path) -> None:
    rows: list[Any] = [*tiny_rows(100), "broken", "broken too"]
    path = write_lines(tmp_path / "a.jsonl", rows)
    settings = config(tmp_path, path, eval_fraction=0.3, on_error="skip", seq_length=96)
    train, held_out = made(settings, fussy), made(settings, fussy, "eval")
    assert train.counts["json"] == 2 and set(held_out.counts) == {"kept"}


def test_own_held_out_files_and_max_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[Any] = tiny_rows(60)
    rows[30] = "a broken line behind the last sample that is wanted"
    train = write_lines(tmp_path / "train.jsonl", rows)
    held_out = write_lines(tmp_path / "eval.jsonl", tiny_rows(9, first=60))
    settings = config(tmp_path, train, eval=str(held_out), max_samples=25, seq_length=96)
    assert made(settings, tokenizer).num_samples == 25
    assert made(settings, tokenizer, "eval").num_samples == 9
    texts = [messages[-1]["content"] for messages, _ in prompts(settings, 3)]
    assert texts == [row["messages"][-2]["content"] for row in tiny_rows(3, first=60)]
    assert prompts(settings, 1)[0][1] == tiny_rows(1, first=60)[0]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (["", "   "], {}, r"a.jsonl holds no row that can be read"),
        (["", "   "], {"format": "messages"}, r"data.train: \S+a.jsonl holds no rows"),
        (
            ["x", "y"],
            {"on_error": "skip", "format": "text"},
            r"none of the rows .* can be used \(2 json\); look at",
        ),
        ([chat("word " * 100, "b")], {}, r"can be used \(1 nothing learnt\); raise data.seq_length"),
        (
            [chat("a", "b")],
            {"eval_fraction": 1e-9},
            r"data.eval_fraction: 1e-09 of the rows of .* holds out none",
        ),
        ([{"title": "a"}], {}, r"a.jsonl:1: columns title fit none of the formats"),
        ([{"title": "a"}], {"on_error": "skip"}, r"a.jsonl:1: columns title fit none of the formats"),
    ],
)
def test_nothing_to_learn_from(
    tokenizer: Tokenizer, tmp_path: Path, rows: list[Any], data: dict[str, Any], message: str
) -> None:
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), **data)
    with pytest.raises(DataError, match=message) as raised:
        prepare(settings, tokenizer)
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("a", "b")])
    settings = config(tmp_path, path, cache=str(path / "inside"))
    with pytest.raises(DataError, match=r"the token cache .*inside cannot be written .*set data.cache"):
        prepare(settings, tokenizer)


def test_a_full_disk(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder._Writer, "finish", full)
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", [chat("a", "b")]))
    with pytest.raises(DataError, match="No space left on device.*free space"):
        prepare(settings, tokenizer)
    assert entries(settings) == []


def test_show_marks_what_is_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        chat("Where? é漢", "Here. é漢"),
        {"messages": []},
        chat("word " * 99, "b"),
        chat("x", "y" * 99),
        chat("a", "b"),
    ]
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", rows), on_error="skip")
    first, second, third, fourth = show(settings, tokenizer, 4)
    assert first.plain.endswith(
        "<|im_start|>user\nWhere? é漢<|im_end|>\n<|im_start|>assistant\nHere. é漢<|im_end|>\n"
    )
    marked = [first.plain[span.start : span.end] for span in first.spans if span.style == "bold green"]
    assert marked == ["Here. é漢<|im_end|>"]
    ids, mask = encode_chat(rows[0]["messages"], tokenizer)
    assert f"a.jsonl:1: {len(ids)} tokens, {sum(mask)} with loss" in first.plain
    assert "a.jsonl:2: left out (no assistant turn" in second.plain
    assert "a.jsonl:3: left out (nothing learnt)" in third.plain
    assert "a.jsonl:4: 64 tokens" in fourth.plain and "truncated" in fourth.plain
    with pytest.raises(DataError, match=r"a.jsonl:2: no assistant turn"):
        show(config(tmp_path, tmp_path / "a.jsonl"), tokenizer, 4)


def test_prompts_of_any_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = ["broken", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    settings = config(
        tmp_path,
        write_lines(tmp_path / "a.jsonl", rows),
        system="S.",
        format="prompt_completion",
        on_error="skip",
    )
    system = {"role": "system", "content": "S."}
    assert prompts(settings, 5) == [
        ([system, {"role": "user", "content": "a"}], "b"),
        ([system, {"role": "user", "content": "c"}], "d"),
    ]


def test_two_processes_may_make_the_same_entry(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any
) -> None:
    settings = config(tmp_path, write_lines(tmp_path / "a.jsonl", tiny_rows(10)), seq_length=96)
    move: Callable[..., None] = builder._move

    def slower(temporary: Path, wanted: Any) -> None:
        monkeypatch.setattr(builder, "_move", move)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another process, which does all of it meanwhile
        prepare(settings, tokenizer)
        move(temporary, wanted)

    monkeypatch.setattr(builder, "_move", slower)
    assert made(settings, tokenizer).num_samples == 10
    assert len(entries(settings)) == 1
