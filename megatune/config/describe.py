"""What the schema allows, in words: for error messages and for docs/config.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from megatune.config.schema import Config

Node = dict[str, Any]


@cache
def schema() -> Node:
    """JSON schema of the configuration."""
    return Config.model_json_schema()


def resolve(node: Node) -> Node:
    """Follow a reference to a section; other keys beside the reference (default, description) win."""
    if "$ref" not in node:
        return node
    target = schema()["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return {**target, **{k: v for k, v in node.items() if k != "$ref"}}


def variants(node: Node) -> dict[str, Node]:
    """Sections of a union that is told apart by its key `type`, by that type; empty for other nodes."""
    if "discriminator" not in node:
        return {}
    found = [resolve(option) for option in node["oneOf"]]
    return {section["properties"]["type"]["const"]: section for section in found}


def sections(node: Node) -> list[Node]:
    """The sections (mappings with known keys) that a value here may be."""
    node = resolve(node)
    if variants(node):
        return list(variants(node).values())
    options = [resolve(option) for option in node.get("anyOf", [node])]
    return [option for option in options if "properties" in option]


def may_be_mapping(node: Node) -> bool:
    """Whether a mapping is allowed here: a section, or a free one such as the arguments of a tracker."""
    node = resolve(node)
    options = [resolve(option) for option in node.get("anyOf", [node])]
    return bool(variants(node)) or any(option.get("type") == "object" for option in options)


def properties(node: Node) -> dict[str, Node]:
    """Keys below a node with their schema, over all variants."""
    return {name: child for section in sections(node) for name, child in section["properties"].items()}


def all_keys(node: Node | None = None, prefix: str = "") -> Iterator[str]:
    """Dotted name of every key, sections included."""
    for name, child in properties(schema() if node is None else node).items():
        yield prefix + name
        yield from all_keys(child, f"{prefix}{name}.")


def find(key: tuple[str, ...]) -> Node | None:
    """Schema of a key, or None where there is none."""
    node = schema()
    for name in key:
        below = properties(node)
        if name not in below:
            return None
        node = below[name]
    return node


def describe(node: Node) -> str:
    """What a value may be: "a number > 0", "one of bf16 or fp32", "text or null"."""
    node = resolve(node)
    if variants(node):
        return f"a mapping with `type`: {either(list(variants(node)))}"
    if "anyOf" in node:
        words = [option["enum"] if "enum" in option else [describe(option)] for option in node["anyOf"]]
        return either([str(word) for some in words for word in some])
    if "enum" in node:
        return f"one of {either([str(value) for value in node['enum']])}"
    if "const" in node:
        return str(node["const"])
    kind = node.get("type")
    if kind == "array":
        choices = node["items"].get("enum")
        return f"a list of {', '.join(choices) if choices else describe(node['items'])}"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(kind, "a mapping")


def either(words: list[str]) -> str:
    """a, b or c"""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _bounds(node: Node) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[name]:g}" for name, sign in signs.items() if name in node]
    return f" {' and '.join(bounds)}" if bounds else ""
