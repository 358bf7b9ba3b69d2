#!/usr/bin/env python3
"""Say which tensors of two checkpoints differ: the verb `megatune diff` without its name."""

from __future__ import annotations

import sys

from megatune.cli import commands

if __name__ == "__main__":
    commands(["diff", *sys.argv[1:]], prog_name="megatune")
