"""Rows of every format, files of every kind, and what is said about bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatune.data.formats import RowError, Sample, detect, parse
from megatune.data.sources import list_files, parse_json_row, read_rows, where
from megatune.errors import DataError
from tests.helpers.datasets import chat, write_lines

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add: 1\n2"},
    {"role": "assistant", "content": "3"},
]


def rows_of(path: Path) -> list[tuple[int, Any]]:
    found = []
    for row in read_rows(path, 0):
        value = row.value
        if isinstance(value, bytes):
            try:
                value = parse_json_row(value)
            except RowError as error:
                value = error
        found.append((row.line, f"{value.kind}: {value}" if isinstance(value, RowError) else value))
    return found


def test_the_same_conversation_in_every_format() -> None:
    messages = {"messages": TURNS}
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Add: 1\n2"},
            {"from": "gpt", "value": "3"},
        ]
    }
    split_system = {"conversations": sharegpt["conversations"][1:], "system": "Be brief."}
    alpaca = {"instruction": "Add: 1", "input": "2", "output": "3", "system": "Be brief."}
    samples = [parse(row, detect(row)) for row in (messages, sharegpt, split_system, alpaca)]
    assert [detect(row) for row in (messages, sharegpt, alpaca)] == ["messages", "sharegpt", "alpaca"]
    assert samples == [Sample("chat", tuple(TURNS), (1, 1, 1))] * 4
    assert len({sample.content_bytes() for sample in samples}) == 1


def test_alpaca_history_and_empty_input() -> None:
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": ""}
    assert [m["content"] for m in parse(row, "alpaca").messages] == ["a", "b", "c", "d"]
    assert [m["role"] for m in parse(row, "alpaca").messages] == ["user", "assistant"] * 2


def test_prompt_and_completion() -> None:
    expected = Sample("completion", prompt="a", completion="b")
    for row in ({"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}):
        assert detect(row) == "prompt_completion"
        assert parse(row, "prompt_completion") == expected
    turns = {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert parse(turns, "prompt_completion").weights == (0, 0, 1)


def test_text() -> None:
    assert detect({"text": "abc", "id": 3}) == "text"
    assert parse({"text": "abc"}, "text") == Sample("text", completion="abc")
    with pytest.raises(RowError, match="text is empty"):
        parse({"text": ""}, "text")


def test_openai_messages_keep_tools_and_weights() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": None,
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "c", "reasoning_content": "hm", "weight": 1.0},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    }
    sample = parse(row, "messages")
    assert sample.messages[0] == {"role": "user", "content": "ab"}
    assert sample.messages[1]["content"] == ""
    assert sample.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert sample.messages[2] == {"role": "tool", "tool_call_id": "1", "content": "2"}
    assert sample.messages[3]["reasoning_content"] == "hm"
    assert sample.weights == (1, 0, 1, 1)
    assert sample.tools == [{"type": "function", "function": {"name": "f"}}]


def test_sharegpt_function_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ]
    }
    messages = parse(row, detect(row)).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]


@pytest.mark.parametrize(
    ("format", "row", "kind", "message"),
    [
        ("messages", [1], "type", "a row must be a JSON object, this is a list"),
        ("messages", {"text": "a"}, "missing", "no column messages"),
        ("messages", {"messages": "hello"}, "type", "messages must be a list, not a text"),
        ("messages", {"messages": ["a"]}, "type", r"messages\[0\] must be an object, not a text"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "type", r"messages\[0\].content must be a text"),
        ("messages", {"messages": [{"role": "user"}]}, "missing", r"no messages\[0\].content"),
        ("messages", {"messages": [{"role": "bot", "content": "a"}]}, "role", "role is 'bot', not one of system"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no_assistant", "no assistant turn"),
        ("messages", {"messages": []}, "no_assistant", "no assistant turn"),
        ("messages", chat("a", "b", tools={"f": 1}), "type", "tools must be a list"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "type",
            "part of type 'image_url'; only text",
        ),
        ("messages", {"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, "type", "weight must be 0 or 1"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "type",
            r"tool_calls\[0\] has no function name",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "type",
            "arguments are not valid JSON",
        ),
        ("sharegpt", {"conversations": [{"from": "cat", "value": "a"}]}, "role", "from is 'cat', not one of"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "missing", r"no conversations\[0\].value"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "type", "must be JSON with name"),
        ("sharegpt", {"x": 1}, "missing", "no column conversations"),
        ("alpaca", {"instruction": "a", "output": None}, "missing", "no column output"),
        ("alpaca", {"instruction": "a", "output": ["b"]}, "type", "output must be a text, not a list"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "type", r"history\[0\] must be a pair"),
        ("prompt_completion", {"prompt": "a"}, "missing", "no column completion"),
        ("prompt_completion", {"prompt": [], "completion": "b"}, "type", "prompt must be a text, not a list"),
        ("text", {"text": 3}, "type", "text must be a text, not a number"),
        ("text", {"text": True}, "type", "text must be a text, not a boolean"),
    ],
)  # fmt: skip
def test_bad_rows(format: str, row: Any, kind: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as raised:
        parse(row, format)
    assert raised.value.kind == kind
    assert "\n" not in str(raised.value)


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(RowError, match="columns body, title fit none of the formats messages, alpaca"):
        detect({"title": "a", "body": "b", "text": None})


def test_json_lines_with_bad_ones_between(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            b"\xef\xbb\xbf" + b'{"text": "first"}',
            "",
            '{"text": "broken',
            b'{"text": "\xff"}',
            b'{"text": "a\x00"}',
            '{"n": ' + "9" * 5000 + "}",
            "[" * 100_000,
            '{"text": "last é"}',
        ],
    )
    found = rows_of(path)
    assert found[0] == (1, {"text": "first"}) and found[-1] == (8, {"text": "last é"})
    kinds = [(line, value.split(":")[0]) for line, value in found[1:-1]]
    assert kinds == [(3, "json"), (4, "encoding"), (5, "encoding"), (6, "json"), (7, "json")]
    assert "column 10" in found[1][1] and "byte 10" in found[2][1] and "NUL" in found[3][1]


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatune.data.sources.MAX_ROW_BYTES", 64)
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "' + "x" * 3000 + '"}', '{"text": "b"}'])
    found = rows_of(path)
    assert found[0][1].startswith("too_big: ") and found[1] == (2, {"text": "b"})


@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays(tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatune.data.sources._CHUNK", 7)  # every element is cut several times
    rows = [{"text": 'a[]{},"é\n'}, {"text": "b" * 50, "n": [1, {"x": None}]}, {"text": "c"}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    found = rows_of(path)
    assert [value for _, value in found] == rows
    assert [line for line, _ in found] == ([2, 5, 14] if indent else [1, 1, 1])


def test_json_array_with_a_number_in_it_and_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n 5, {"text": "b"}]')
    assert rows_of(tmp_path / "a.json") == [
        (1, {"text": "a"}),
        (2, "type: a row must be a JSON object"),
        (2, {"text": "b"}),
    ]
    (tmp_path / "b.json").write_text(" [ ] ")
    assert rows_of(tmp_path / "b.json") == []
    write_lines(tmp_path / "c.json", [{"text": "a"}, {"text": "b"}])
    assert rows_of(tmp_path / "c.json") == [(1, {"text": "a"}), (2, {"text": "b"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n{"text": tru}]', r"a.json:2: not valid JSON \(Expecting value\)"),
        (b'[{"text": "a"},\n{"text": "b"', r"a.json:2: not valid JSON"),
        (b'[{"text": "a"}\n{"text": "b"}]', r"a.json:2: a comma or \] is missing"),
        (b'[{"text": "a"},\n', r"a.json:2: the file ends inside the array"),
        (b'[{"text": "a"}\n', r"a.json:2: the file ends inside the array"),
        (b'[{"text": "\xff"}]', r"a.json:1: not UTF-8"),
    ],
)
def test_broken_json_arrays(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / "a.json")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,completion\r\n"one,\nmore",two\r\n\r\nonly\r\n"\xff",b\r\n"a\x00",b\r\n"a"b,c\r\nlast,row\r\n'
    )
    found = rows_of(path)
    assert found[0] == (2, {"prompt": "one,\nmore", "completion": "two"})
    assert found[-1] == (9, {"prompt": "last", "completion": "row"})
    assert [(line, value.split(":")[0]) for line, value in found[1:-1]] == [
        (5, "csv"),
        (6, "encoding"),
        (7, "encoding"),
        (8, "csv"),
    ]
    (tmp_path / "b.csv").write_text("1,2\n3,4\n")
    with pytest.raises(DataError, match=r"b.csv:1: the first line must name the columns"):
        rows_of(tmp_path / "b.csv")


def test_csv_with_json_in_a_cell(tmp_path: Path) -> None:
    import csv

    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(TURNS), ""]])
    ((_, row),) = rows_of(tmp_path / "a.csv")
    assert detect(row) == "messages"
    assert parse(row, "messages") == Sample("chat", tuple(TURNS), (1, 1, 1))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": TURNS, "id": 1},
        {"messages": [*TURNS[1:], {"role": "tool", "content": "x", "tool_call_id": "7"}], "id": 2},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [line for line, _ in found] == [1, 2] and "id" not in found[0][1]
    samples = [parse(row, detect(row)) for _, row in found]
    assert samples[0] == Sample("chat", tuple(TURNS), (1, 1, 1))
    assert samples[1].messages[2] == {"role": "tool", "content": "x", "tool_call_id": "7"}
    assert where(tmp_path / "a.parquet", 2).endswith("a.parquet, row 2")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has none of the columns .*\(it has body\)"):
        rows_of(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"c.parquet is no readable Parquet file"):
        rows_of(tmp_path / "c.parquet")


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("b.jsonl", "a.CSV", "notes.md"):
        (tmp_path / "d" / name).write_text("x")
    (tmp_path / "e.json").write_text("x")
    assert [path.as_posix() for path in list_files(["e.json", "d"], "train")] == [
        "e.json",
        "d/a.CSV",
        "d/b.jsonl",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nowhere.jsonl"], r"data.train: nowhere.jsonl does not exist \(looked from "),
        (["notes.md"], r"data.train: notes.md has no known ending; use one of \.jsonl"),
        (["empty.jsonl"], r"data.train: empty.jsonl is empty"),
        (["folder"], r"data.train: folder folder holds no data files"),
        ([], r"data.train names no file"),
    ],
)
def test_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=message):
        list_files(names, "train")
