"""Rows of a data file to samples: the forms in which people keep instruction data.

| format            | columns                                                                                     |
|-------------------|---------------------------------------------------------------------------------------------|
| messages          | messages (or conversations): [{role, content, weight?, tool_calls?, ...}]; tools?           |
| sharegpt          | conversations (or messages): [{from, value}]; system?, tools?                                |
| alpaca            | instruction, output; input?, system?, history?: [[question, answer], ...]                    |
| prompt_completion | prompt, completion (or question, answer): texts, or lists of messages                        |
| text              | text                                                                                         |

Other columns are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatune.errors import DataError

FORMATS = ("messages", "alpaca", "sharegpt", "prompt_completion", "text")
COLUMNS = (
    *("messages", "conversations", "tools", "system", "instruction", "input", "output", "history"),
    *("prompt", "completion", "question", "answer", "text"),
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


class RowError(DataError):
    """A row that cannot be used. `kind`: short name under which skipped rows are counted. The reader puts file and
    line in front of the message."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Sample:
    """One row. kind "chat": `messages` as a chat template takes them, `weights` (0 or 1) for each of them, `tools`.
    kind "completion": `prompt` and `completion` texts, rendered as a chat where there is a template, else joined.
    kind "text": `completion` is the text, all of it has loss."""

    kind: Literal["chat", "completion", "text"]
    messages: tuple[dict[str, Any], ...] = ()
    weights: tuple[int, ...] = ()
    tools: list[Any] | None = None
    prompt: str = ""
    completion: str = ""

    def content_bytes(self) -> bytes:
        """The same bytes for the same content, whatever the file format or the order of keys."""
        parts = [self.kind, self.messages, self.tools, self.prompt, self.completion]
        return json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()


def detect(row: Mapping[str, Any]) -> str:
    """Name of the row's format; RowError that lists its columns where none fits."""
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            turns = _list_of_objects(_from_json(row[column]), column)
            return "sharegpt" if turns and "from" in turns[0] else "messages"
    present = {name for name, value in row.items() if value is not None}
    for name, needed in (
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("prompt_completion", {"question", "answer"}),
        ("text", {"text"}),
    ):
        if needed <= present:
            return name
    raise RowError(
        "format",
        f"columns {', '.join(sorted(present)[:12]) or '(none)'} fit none of the formats {', '.join(FORMATS)}; rename "
        "them or set data.format",
    )


def parse(row: Any, format: str) -> Sample:
    """One row (a JSON object) in a given format. RowError for anything that does not fit."""
    if not isinstance(row, dict):
        raise RowError("type", f"a row must be a JSON object, this is {_type(row)}")
    return _PARSERS[format](row)


def _parse_messages(row: dict[str, Any]) -> Sample:
    column = "messages" if row.get("messages") is not None else "conversations"
    if row.get(column) is None:
        raise RowError("missing", "no column messages")
    turns = _list_of_objects(_from_json(row[column]), column)
    return _chat([_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)], row)


def _parse_sharegpt(row: dict[str, Any]) -> Sample:
    column = "conversations" if row.get("conversations") is not None else "messages"
    if row.get(column) is None:
        raise RowError("missing", "no column conversations")
    messages = []
    for i, turn in enumerate(_list_of_objects(_from_json(row[column]), column)):
        where = f"{column}[{i}]"
        speaker = _text(turn, "from", where)
        if speaker not in _SPEAKERS:
            known = ", ".join(_SPEAKERS)
            raise RowError("role", f"{where}.from is {speaker!r}, not one of {known}")
        content = _text(turn, "value", where)
        message = {"role": _SPEAKERS[speaker], "content": content}
        if speaker == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls_in_text(content, where)}
        messages.append((message, _weight(turn, where)))
    return _chat(messages, row)


def _parse_alpaca(row: dict[str, Any]) -> Sample:
    messages: list[tuple[dict[str, Any], int]] = []
    for i, pair in enumerate(_from_json(row.get("history")) or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("type", f"history[{i}] must be a pair of texts")
        messages += [
            ({"role": "user", "content": pair[0]}, 1),
            ({"role": "assistant", "content": pair[1]}, 1),
        ]
    question = _text(row, "instruction")
    if row.get("input"):
        question += "\n" + _text(row, "input")
    messages.append(({"role": "user", "content": question}, 1))
    messages.append(({"role": "assistant", "content": _text(row, "output")}, 1))
    return _chat(messages, row)


def _parse_prompt_completion(row: dict[str, Any]) -> Sample:
    names = (
        ("question", "answer")
        if row.get("prompt") is None and "question" in row
        else ("prompt", "completion")
    )
    sides = [row.get(name) for name in names]
    if not all(isinstance(side, list) for side in sides):
        return Sample("completion", prompt=_text(row, names[0]), completion=_text(row, names[1]))
    messages = []
    for name, side in zip(names, sides, strict=True):
        turns = [_message(turn, f"{name}[{i}]") for i, turn in enumerate(_list_of_objects(side, name))]
        if name == names[0]:  # only the completion is learnt
            turns = [(message, 0) for message, _ in turns]
        messages += turns
    return _chat(messages, row)


def _parse_text(row: dict[str, Any]) -> Sample:
    text = _text(row, "text")
    if not text:
        raise RowError("empty", "text is empty")
    return Sample("text", completion=text)


_PARSERS: dict[str, Callable[[dict[str, Any]], Sample]] = {
    "messages": _parse_messages,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
}


def _chat(turns: list[tuple[dict[str, Any], int]], row: dict[str, Any]) -> Sample:
    system = row.get("system")
    if system and (not turns or turns[0][0]["role"] != "system"):
        turns = [({"role": "system", "content": _text(row, "system")}, 1), *turns]
    if not any(message["role"] == "assistant" for message, _ in turns):
        raise RowError("no_assistant", "no assistant turn: nothing to learn from")
    tools = _from_json(row.get("tools")) or None
    if tools is not None and not isinstance(tools, list):
        raise RowError("type", f"tools must be a list, not {_type(tools)}")
    return Sample("chat", tuple(m for m, _ in turns), tuple(w for _, w in turns), tools)


def _message(turn: dict[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """An OpenAI message as a template takes it, and its weight."""
    role = _text(turn, "role", where)
    if role not in ROLES:
        raise RowError("role", f"{where}.role is {role!r}, not one of {', '.join(ROLES)}")
    # Columnar files give every message every key; a template must not see those that are null.
    message = {key: value for key, value in turn.items() if value is not None and key != "weight"}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _join_parts(content, where)
    elif content is None and role == "assistant" and "tool_calls" in message:
        message["content"] = ""
    else:
        message["content"] = _text(turn, "content", where)
    if "tool_calls" in message:
        calls = _list_of_objects(message["tool_calls"], f"{where}.tool_calls")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message, _weight(turn, where)


def _join_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _type(part)
            raise RowError("type", f"{where}.content holds a part of type {kind!r}; only text is trained on")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write them out as JSON themselves."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("type", f"{where} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RowError("type", f"{where}: arguments are not valid JSON ({error})") from error
    function = {**function, "arguments": {} if arguments is None else arguments}
    return (
        {**call, "type": call.get("type") or "function", "function": function}
        if "function" in call
        else function
    )


def _calls_in_text(text: str, where: str) -> list[dict[str, Any]]:
    calls = _from_json(text)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RowError("type", f"{where}.value of a function_call must be JSON with name and arguments")
    items = _list_of_objects(calls, f"{where}.value")
    return [
        {"type": "function", "function": _call(call, f"{where}.value[{i}]")} for i, call in enumerate(items)
    ]


def _weight(turn: dict[str, Any], where: str) -> int:
    weight = turn.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, (int, float)) and weight in (0, 1):
        return int(weight)
    raise RowError("type", f"{where}.weight must be 0 or 1, not {weight!r}")


def _text(row: Mapping[str, Any], name: str, where: str = "") -> str:
    value = row.get(name)
    label = f"{where}.{name}" if where else name
    if value is None:
        raise RowError("missing", f"no {label}" if where else f"no column {label}")
    if not isinstance(value, str):
        raise RowError("type", f"{label} must be a text, not {_type(value)}")
    return value


def _list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("type", f"{name} must be a list, not {_type(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise RowError("type", f"{name}[{i}] must be an object, not {_type(item)}")
    return value


def _from_json(value: Any) -> Any:
    """Nested values come as JSON text in CSV files (and in some others)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
