"""What each parameter is globally, and how a layout slices it.

One global tensor per parameter: a layout (TP, EP, PP, ZeRO) is a slicing of it and nothing else. Fused weights are
ordered so that every contiguous slice along dimension 0 makes sense by itself (`Fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """Order of the rows of a weight that joins several matrices along dimension 0.

    The rows are `groups` equal groups; within a group, each part's rows stand one part after the other. For `qkv`
    a group is one KV head with its query heads: parts (("q", q_per_kv * head_dim), ("k", head_dim), ("v", head_dim)),
    groups = kv_heads. For `gate_up` a group is one row of each: parts (("gate", 1), ("up", 1)), groups = mlp_size.

    `parts`: (name, rows of that part in one group), in order.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int

    @property
    def group_rows(self) -> int:
        return sum(rows for _, rows in self.parts)

    @property
    def rows(self) -> int:
        return self.groups * self.group_rows

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def part_rows(self, name: str) -> int:
        """Rows of one part in one group."""
        return dict(self.parts)[name]

    def offsets(self) -> Iterator[tuple[str, int, int]]:
        """(name, first row within a group, rows) for each part."""
        start = 0
        for name, rows in self.parts:
            yield name, start, rows
            start += rows


@dataclass(frozen=True)
class ShardSpec:
    """One parameter, globally.

    `name`: global name, the same under every layout. `shape`: global shape. `tensor_dim`: which dimension tensor
    parallelism cuts (None: replicated). `fused`: order of the rows where the weight joins several matrices.
    `partial`: under tensor parallelism each rank's gradient of this replicated parameter is a partial sum.
    """

    name: str
    shape: tuple[int, ...]
    tensor_dim: int | None = None
    fused: Fused | None = None
    partial: bool = False
