"""pydantic's errors as sentences that name the key, where it was set, what it is and what it may be."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from megatune.config import describe
from megatune.config.suggest import suggest
from megatune.config.yaml_reader import Key

Where = Callable[[Key], str]
"""Key -> where it was set ("FILE, line 3", "override `a.b=c`"); for a key that was not set, where it should be."""


def explain(error: ValidationError, tree: dict[str, Any], where: Where) -> str:
    """One sentence for each key that cannot be used, each on its own line. `tree`: what was validated."""
    sentences: dict[Key, str] = {}
    for problem in error.errors():
        # A union reports one error for each branch: the key they share is what the user sees.
        key, sentence = _sentence(problem, tree, where)
        sentences.setdefault(key, sentence)
    return "\n".join(sentences.values())


def _sentence(problem: Any, tree: dict[str, Any], where: Where) -> tuple[Key, str]:
    kind, location = problem["type"], problem["loc"]
    if kind == "extra_forbidden":
        section, node = _locate(location[:-1])
        key = (*section, str(location[-1]))
        return key, _unknown(key, node, isinstance(problem["input"], dict), where)
    key, node = _locate(location)
    if kind == "union_tag_not_found":
        key = (*key, "type")
        types = describe.either(list(describe.variants(node)))
        return key, f"missing key `{'.'.join(key)}` in {where(key)}: one of {types}"
    if kind == "union_tag_invalid":
        key, allowed = (*key, "type"), list(describe.variants(node))
        return key, _bad_value(key, _value(tree, key), f"one of {describe.either(allowed)}", allowed, where)
    if kind == "missing":
        while node.get("required"):  # a missing section: name the key that it cannot do without
            key, node = (*key, node["required"][0]), node["properties"][node["required"][0]]
        what = node.get("description", describe.describe(node)).rstrip(".")
        return key, f"missing key `{'.'.join(key)}` in {where(key)}: {what}"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return key, f"`{'.'.join(key)}` in {where(key)}: {message}" if key else f"{where(key)}: {message}"
    allowed = [str(value) for option in node.get("anyOf", [node]) for value in _choices(option)]
    return key, _bad_value(key, _value(tree, key), describe.describe(node), allowed, where)


def _unknown(key: Key, node: describe.Node, is_mapping: bool, where: Where) -> str:
    start = f"unknown key `{'.'.join(key)}` in {where(key)}"
    types = [tag for tag, section in describe.variants(node).items() if key[-1] in section["properties"]]
    if types:
        return f"{start}; it belongs to `{'.'.join(key[:-1])}.type`: {describe.either(types)}"
    near = suggest(key, is_mapping)
    if near:
        return f"{start}; did you mean {describe.either([f'`{name}`' for name in near])}?"
    known = describe.either(list(describe.properties(node)))
    return f"{start}; the keys {'of `' + '.'.join(key[:-1]) + '`' if key[:-1] else 'here'} are {known}"


def _bad_value(key: Key, value: Any, allowed: str, choices: list[str], where: Where) -> str:
    near = [m for word in _texts(value) if word not in choices for m in get_close_matches(word, choices, 1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"`{'.'.join(key)}` in {where(key)} is {_show(value)} but must be {allowed}{hint}"


def _locate(location: tuple[int | str, ...]) -> tuple[Key, describe.Node]:
    """The key that an error's location means, and its schema: without list positions and branches of unions."""
    key: Key = ()
    node = describe.schema()
    for part in location:
        if part in describe.variants(node):
            continue
        below = describe.properties(node)
        if part not in below:
            break
        key, node = (*key, str(part)), describe.resolve(below[str(part)])
    return key, node


def _choices(node: describe.Node) -> list[Any]:
    node = node.get("items", node)
    return node.get("enum", [node["const"]] if "const" in node else [])


def _value(tree: Any, key: Key) -> Any:
    for name in key:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _texts(value: Any) -> list[str]:
    return [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
