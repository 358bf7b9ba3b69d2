"""A layout given in one word, as in tp8-pp16-dp80-ep8."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatune.config.layout import Layout
from megatune.config.schema import Config
from megatune.errors import ParallelError

# Dimension -> the key of `parallel` that it sets; dp has none: it is what is left of the processes.
_KEYS = {
    "tp": "tensor",
    "pp": "pipeline",
    "cp": "context",
    "ep": "expert",
    "etp": "expert_tensor",
    "replicate": "replicate",
    "dp": None,
}

Role = Literal["first", "middle", "last"]


@dataclass(frozen=True)
class Mesh:
    """Sizes by dimension, as far as they were given."""

    sizes: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """tp8-pp16-dp80[-cp1][-ep8][-etp1][-replicate2]; what is left out is 1. ParallelError for anything else."""
        sizes: dict[str, int] = {}
        for part in text.split("-"):
            match = re.fullmatch(r"([a-z]+)([0-9]+)", part)
            if match is None or match[1] not in _KEYS or int(match[2]) < 1 or match[1] in sizes:
                raise ParallelError(
                    f"--mesh: {part!r} in {text!r} is not one of {', '.join(_KEYS)} followed by its size, each once; "
                    "write for example tp8-pp16-dp80"
                )
            sizes[match[1]] = int(match[2])
        return cls(sizes)

    @property
    def world_size(self) -> int:
        """Processes of the layout: ep and etp take theirs from the others, replicate is a part of dp."""
        size = 1
        for name in ("tp", "pp", "cp", "dp"):
            size *= self.sizes.get(name, 1)
        return size

    def apply(self, config: Config) -> Config:
        """`config` with the sizes of this layout in its `parallel` section, whose other options stay."""
        changes = {key: self.sizes.get(name, 1) for name, key in _KEYS.items() if key is not None}
        changes["expert_tensor"] = self.sizes.get("etp")
        return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def rank_of(role: Role, layout: Layout) -> int:
    """The first process of the first, a middle or the last pipeline rank. ParallelError where there is no middle."""
    place = {"first": 0, "middle": layout.pp // 2, "last": layout.pp - 1}[role]
    if role == "middle" and layout.pp < 3:
        raise ParallelError(
            f"--role: a pipeline of {layout.pp} has no middle; use {' or '.join(roles(layout))}"
        )
    return place * (layout.world_size // layout.pp)


def roles(layout: Layout) -> tuple[Role, ...]:
    """The roles that differ."""
    if layout.pp == 1:
        return ("first",)
    return ("first", "last") if layout.pp == 2 else ("first", "middle", "last")
