#!/usr/bin/env python3
"""Write docs/config.md from the configuration's schema: `tools/make_config_docs.py [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatune.config import describe  # noqa: E402

INTRODUCTION = """# Configuration

<!-- Made by tools/make_config_docs.py from megatune/config/schema.py: change it there, then `make docs`. -->

A run is described by one YAML file; `megatune train FILE KEY=VALUE ...` overrides its keys, with dots between section
and key and a YAML value (`optim.lr=1e-4`, `data.train=[a.jsonl, b.jsonl]`, `data.eval=` for null).

- `include: FILE` or `include: [FILE, ...]` at the top of a file reads those first; paths in it are relative to the
  file they stand in. Mappings merge, everything else is replaced, and a mapping whose `type` changes is replaced too.
- All other paths are relative to the working directory. Environment variables are not expanded.
- Numbers such as `1e-4` are numbers; only `true` and `false` are truth values, so `yes` and `12:30` are text.
- A key that does not exist is an error that names the nearest one that does.

Keys without a default must be given.
"""


def config_page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, node in describe.properties(describe.schema()).items():
        node = describe.resolve(node)
        parts.append(f"## {name}\n")
        types = describe.variants(node)
        for tag, variant in types.items():
            parts.append(f"### {name}.type: {tag}\n\n{variant['properties']['type']['description']}\n")
            if len(variant["properties"]) > 1:
                parts.append(_table(name, variant))
        if not types:
            parts.append(_table(name, node))
    return "\n".join(parts)


def _table(name: str, section: describe.Node) -> str:
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *_rows(name, section)]) + "\n"


def _rows(prefix: str, section: describe.Node) -> Iterator[str]:
    for name, node in section["properties"].items():
        if name == "type":
            continue
        node = describe.resolve(node)
        default = "**required**" if name in section.get("required", []) else _default(node)
        cells = [describe.describe(node), default, node["description"]]
        yield " | ".join([f"| `{prefix}.{name}`", *(_plain(cell) for cell in cells)]) + " |"
        for below in describe.sections(node):
            yield from _rows(f"{prefix}.{name}", below)


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "\\<")


def _default(node: describe.Node) -> str:
    value = node.get("default", "empty")  # made by a factory: an empty list or mapping
    if value is None or value == "empty":
        return str(value or "null")
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/config.md"
    target.write_text(config_page(), "utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
