#!/usr/bin/env bash
# Start a run with Open MPI's mpirun, one process for each GPU.
#
#   launch/mpirun.sh 8 CONFIG [KEY=VALUE ...]
#   HOSTS=node1:8,node2:8 launch/mpirun.sh 16 CONFIG [KEY=VALUE ...]      # rank 0 runs on the first of HOSTS
#
# MPI only starts the processes: megatune reads its variables, and the ranks talk over NCCL or gloo.
# MASTER_PORT: a port that is free on the first host. MPIRUN_ARGS: more options for mpirun.
# PYTHON: the interpreter (default: this checkout's .venv, else python3).
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: [HOSTS=node1:8,...] $0 PROCESSES CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
processes=$1
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3

options=(-np "$processes" --bind-to none) # by default mpirun ties each rank to one core
if [[ -n ${HOSTS:-} ]]; then
    export MASTER_ADDR=${MASTER_ADDR:-${HOSTS%%[:,]*}} MASTER_PORT=${MASTER_PORT:-29500}
    options+=(--host "$HOSTS" -x MASTER_ADDR -x MASTER_PORT)
fi
read -ra more <<<"${MPIRUN_ARGS:-}"

# The ranks of a machine share its cores: one thread each, unless told otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec mpirun "${options[@]}" -x OMP_NUM_THREADS "${more[@]}" "$python" -m megatune train "$@"
