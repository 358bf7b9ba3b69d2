#!/usr/bin/env python3
"""Say what a checkpoint is: the verb `megatune inspect` without its name."""

from __future__ import annotations

import sys

from megatune.cli import commands

if __name__ == "__main__":
    commands(["inspect", *sys.argv[1:]], prog_name="megatune")
