# make quickstart   fine-tune a small real model here, from nothing
# make test         lint, and every test that this machine can run
# All of it happens in .venv, which is made on first use (PYTHON=... chooses the interpreter).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: quickstart test coverage lint format venv gpu-test slurm-test docs clean

VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

quickstart: venv runs/quickstart-data/train.jsonl
	@$(BIN)/megatune train configs/quickstart.yaml

runs/quickstart-data/train.jsonl: | venv
	@$(BIN)/python tools/make_docstring_data.py runs/quickstart-data --max-chars 1000

# Two workers: two cores are enough, and each worker starts ranks of its own.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup
	@$(BIN)/pytest -m "slurm and not slow" tests/slurm

# The tests again with every line counted, which makes them take more than twice as long.
coverage: venv
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --cov --cov-fail-under=85

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu-test: venv
	@$(BIN)/pytest -m gpu tests

# A real Slurm with two nodes on this machine; needs root. Skipped, with the reason, where it cannot be.
slurm-test: venv
	@$(BIN)/pytest -m slurm tests/slurm

docs: venv
	@$(BIN)/python tools/make_config_docs.py
	@$(BIN)/python tools/make_parallel_docs.py

venv: $(VENV)/.installed
	@:

$(VENV)/.installed: tools/make_venv.sh $(SOURCES)
	@tools/make_venv.sh $(VENV)
	@touch $@

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	@find megatune -name '*.so' -delete
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
