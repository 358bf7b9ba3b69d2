#!/usr/bin/env bash
# Start a run with torchrun: here, or with the same command on each of several machines.
#
#   launch/torchrun.sh CONFIG [KEY=VALUE ...]
#   NNODES=2 MASTER_ADDR=node1 launch/torchrun.sh CONFIG [KEY=VALUE ...]      # on node1 and on node2
#
# NPROC_PER_NODE: processes on this machine (default: one a GPU, or one a CPU core where there is no GPU).
# MASTER_ADDR, MASTER_PORT: a machine that takes part and a free port on it; only for NNODES > 1.
# PYTHON: the interpreter (default: this checkout's .venv, else python3).
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: [NNODES=N MASTER_ADDR=HOST] $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3

nodes=${NNODES:-1}
if [[ $nodes == 1 ]]; then
    meet=(--standalone)
else
    : "${MASTER_ADDR:?set it to the name of one of the machines, the same on all of them}"
    meet=(--rdzv-backend=c10d --rdzv-id=megatune --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}")
fi

exec "$python" -m torch.distributed.run \
    --nnodes="$nodes" --nproc-per-node="${NPROC_PER_NODE:-auto}" "${meet[@]}" \
    -m megatune train "$@"
