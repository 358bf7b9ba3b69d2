#!/usr/bin/env bash
# One process of a run that mpirun starts: turns MPI's variables into those that megatune reads.
#
#   mpirun -np 8 launch/mpirun.sh CONFIG [KEY=VALUE ...]
#   mpirun -np 16 --host node1:8,node2:8 -x MASTER_ADDR=node1 launch/mpirun.sh CONFIG [KEY=VALUE ...]
#
# Open MPI, MPICH and Intel MPI (for the latter two: -genv MASTER_ADDR node1). Only starts the processes: they talk
# over NCCL or gloo, MPI itself is not used.
# MASTER_ADDR: the machine of rank 0 (needed for more than one machine). MASTER_PORT: a free port there.
# PYTHON: the interpreter (default: this checkout's .venv, else python3).
set -euo pipefail

export RANK=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}
export WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}
export LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-}}
export LOCAL_WORLD_SIZE=${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-}}

if [[ $# -eq 0 || -z $RANK || -z $WORLD_SIZE || -z $LOCAL_RANK || -z $LOCAL_WORLD_SIZE ]]; then
    echo "usage: mpirun -np N $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
if [[ $LOCAL_WORLD_SIZE != "$WORLD_SIZE" ]]; then
    : "${MASTER_ADDR:?set it to the machine of rank 0, for all processes}"
fi
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
export MASTER_PORT=${MASTER_PORT:-29500}
# As torchrun does: several processes share a machine's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3
exec "$python" -m megatune train "$@"
