#!/bin/sh
# Stands for Python in `python -m megatune agent ...`: $WARM_PYTHON runs tests/slurm/warm_agent.py instead.
root=$(dirname "$(dirname "$(dirname "$(readlink -f "$0")")")")
shift 2 # -m megatune
PYTHONPATH=$root exec "$WARM_PYTHON" -m tests.slurm.warm_agent "$@"
