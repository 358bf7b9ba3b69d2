#!/usr/bin/env bash
# Start a run with mpirun, one process for each GPU (Open MPI, MPICH or Intel MPI).
#
#   launch/mpirun.sh 8 CONFIG [KEY=VALUE ...]
#   HOSTS=node1:8,node2:8 launch/mpirun.sh 16 CONFIG [KEY=VALUE ...]
#
# MPI starts the processes and tells them who is where; they talk over NCCL or gloo. On several machines that needs
# mpi4py in the interpreter's environment (pip install mpi4py), for the same MPI as this mpirun.
# MPIRUN: the mpirun (default: the interpreter's neighbour, else PATH's). MPIRUN_ARGS: more options for it.
# PYTHON: the interpreter (default: this checkout's .venv, else python3).
# To stop with a checkpoint: kill -USR1 PID-OF-MPIRUN (Open MPI kills the ranks at once on SIGTERM).
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
mpirun=${MPIRUN:-$(dirname "$python")/mpirun}
[[ -x $mpirun || -n ${MPIRUN:-} ]] || mpirun=mpirun

options=(-n "$processes")
if [[ $("$mpirun" --version 2>&1) == *"Open MPI"* || $("$mpirun" --version 2>&1) == *"OpenRTE"* ]]; then
    options+=(--bind-to none -x OMP_NUM_THREADS) # by default each rank is tied to one core
    [[ -z ${HOSTS:-} ]] || options+=(--host "$HOSTS")
else # hydra hands the environment on
    [[ -z ${HOSTS:-} ]] || options+=(-hosts "$HOSTS")
fi
read -ra more <<<"${MPIRUN_ARGS:-}"

# The ranks of a machine share its cores: one thread each, unless told otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$mpirun" "${options[@]}" "${more[@]}" "$python" -m megatune train "$@"
