#!/usr/bin/env python3
"""Average the weights of several checkpoints: the verb `megatune average` without its name."""

from __future__ import annotations

import sys

from megatune.cli import commands

if __name__ == "__main__":
    commands(["average", *sys.argv[1:]], prog_name="megatune")
