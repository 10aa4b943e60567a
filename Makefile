# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: venv quickstart test ordinary test-slow gpu mutations check format golden tensorboard clean

# The package in its own virtual environment; again only when its settings change.
$(VENV)/.core: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (torch is the large part) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(PIP) -e '.[gguf,hf,parquet,slurm,torchao,dev]'
	@touch $@

# The environment alone, for your own teacher and data.
venv: $(VENV)/.core

quickstart: $(VENV)/.core
	@$(BIN)/python -m launchers.quickstart $(ARGS)

# A worker for each of up to eight cores; tests that share a trained run or a cache are in one file, and stay together.
CORES := $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
WORKERS := $(if $(filter-out 1,$(CORES)),-n $(CORES) --dist loadfile --no-loadscope-reorder)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -m 'not slow and not gpu' $(WORKERS) $(ARGS)

# With the real teacher and corpus (after `make quickstart`).
test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 3600 $(ARGS)

# On a machine with an NVIDIA GPU: tests on the GPU, then all figures, in six minutes. PYTHON=… names the Python that has
# torch. Without it, that of $(VENV) is taken where it exists, else the system's.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
gpu:
	@PYTHON=$(GPU_PYTHON) WHEELS=$(WHEELS) OUT=$(OUT) benchmarks/gpu/run.sh $(ARGS)

# Do the tests of the losses notice? Breaks the code in one place after another; ten minutes.
mutations: $(VENV)/.dev
	@$(BIN)/python -m tests.mutations

# What most x86-64 users have: two variables hold an AVX-512 machine to AVX2. They change nothing on other machines.
# Interpreted kernels compute in numpy, which knows neither variable.
ORDINARY_TESTS := tests/kd_core/losses tests/kd_core/students tests/kd_core/test_precision.py \
    --ignore tests/kd_core/losses/fused/test_triton_backend.py
ordinary: export ONEDNN_MAX_CPU_ISA = AVX2
ordinary: export ATEN_CPU_CAPABILITY = avx2
ordinary: $(VENV)/.dev
	@$(BIN)/python -m pytest -m 'not slow and not gpu' $(WORKERS) $(ORDINARY_TESTS) $(ARGS)
	@$(BIN)/python -m benchmarks.first_steps

check: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(BIN)/python -m tests.style

format: $(VENV)/.dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

golden: $(VENV)/.dev
	@UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/experiments
	@git diff --stat tests/golden

tensorboard: $(VENV)/.core
	@$(BIN)/tensorboard --logdir runs $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
