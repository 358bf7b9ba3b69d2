"""YAML for configuration files: safe, small, with line numbers, and without YAML 1.1's surprises.

Scalars follow the core schema of YAML 1.2: `1e-4` is a number, `yes` and `12:30` are text (PyYAML's YAML 1.1 says
text, true and 750). Duplicate keys are an error. Aliases work, but cannot blow a small file up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import yaml

from megatune.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000  # after aliases are expanded
MAX_DEPTH = 24

Key = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader's scanner and parser with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which only YAML 1.2 takes for a number."""


def _whole(pattern: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern.pattern})\Z")


_Loader.add_implicit_resolver(_TAG + "null", _whole(_NULL), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", _whole(_BOOL), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _whole(_INT), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _whole(_FLOAT), list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"<<\Z"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _whole(_FLOAT), list("-+.0123456789"))

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": lambda text: int(text, 16) if text.startswith("0x") else int(text.replace("_", "")),
    _TAG + "float": lambda text: float(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", text.replace("_", ""))),
    _TAG + "str": str,
}


def read_yaml(text: str, source: str) -> tuple[Any, dict[Key, int]]:
    """The value of a YAML document, and the line (from 1) of every key in it. `source` names it in errors.

    Raises ConfigError with the line where `text` is not YAML, repeats a key, has tags that build objects, or is
    larger than a configuration can be.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_BYTES >> 20} MiB, too large for a configuration")
    try:
        node = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line} is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested deeper than {MAX_DEPTH} levels") from None
    if node is None:
        return None, {}
    builder = _Builder(source)
    return builder.build(node, ()), builder.lines


def write_yaml(value: Any) -> str:
    """Block style, keys in their order; `read_yaml` and any YAML 1.1 reader give the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Builder:
    """Turns nodes into values. Aliases are shared nodes, so they are expanded here, and counted."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values = 0
        self.lines: dict[Key, int] = {}

    def build(self, node: yaml.Node, key: Key) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            self._fail(node, f"has more than {MAX_VALUES} values (aliases counted each time)")
        if len(key) > MAX_DEPTH:
            self._fail(node, f"is nested deeper than {MAX_DEPTH} levels")
        self.lines[key] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(child, (*key, str(i))) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            self._fail(node, f"has the tag {node.tag.replace(_TAG, '!!')}, which a configuration may not use")
        try:
            return _SCALARS[node.tag](node.value)
        except ValueError:
            self._fail(node, f"has a number that cannot be read: {node.value[:40]}")

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if name_node.tag == _TAG + "merge":
                self._fail(name_node, "uses a merge key (<<), which is not supported; use include: FILE")
            if not isinstance(name_node, yaml.ScalarNode):
                self._fail(name_node, "has a key that is not text")
            name = name_node.value
            inner = (*key, name)
            if name in result:
                first = self.lines[inner]
                self._fail(name_node, f"gives the key `{'.'.join(inner)}` again (first in line {first})")
            result[name] = self.build(value_node, inner)
            self.lines[inner] = name_node.start_mark.line + 1
        return result

    def _fail(self, node: yaml.Node, problem: str) -> NoReturn:
        raise ConfigError(f"{self.source}, line {node.start_mark.line + 1} {problem}")
