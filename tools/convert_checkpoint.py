#!/usr/bin/env python3
"""Convert a checkpoint to another format: the verb `megatune convert` without its name.

tools/convert_checkpoint.py SRC DST --to hf|megatune|megatron|torch_dist|peft [--verify] ...
"""

from __future__ import annotations

import sys

from megatune.cli import commands

if __name__ == "__main__":
    commands(["convert", *sys.argv[1:]], prog_name="megatune")
