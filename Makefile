# The only commands; `make help` lists them. Each does its own set-up.
SHELL := /bin/bash
# The first of these that runs: a version manager may have a name for one that is not there.
PYTHONS := python3.11 python3.12 python3.13
PYTHON ?= $(or $(shell for each in $(PYTHONS); do $$each -c '' 2>/dev/null && echo $$each && break; done),python3.11)
PYTHON_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
# Without torch and vLLM, for tests that run no engine.
FAST_VENV := .venv-fast
FAST_INSTALLED = $(FAST_VENV)/.installed-$(PYTHON_VERSION)
# vLLM's CPU build has wheels for Linux on these; elsewhere, and with VLLM=no, the transformers backend serves.
SYSTEM := $(shell uname -s)-$(shell uname -m)
VLLM ?= $(if $(filter Linux-x86_64 Linux-aarch64,$(SYSTEM)),yes,no)
REQUIREMENTS := requirements/$(if $(filter Darwin-%,$(SYSTEM)),dev-macos,$(if $(filter yes,$(VLLM)),dev-cpu,dev-transformers)).txt
INSTALLED := $(VENV)/.installed-$(basename $(notdir $(REQUIREMENTS)))
DEMO := .demo
DEMO_MODEL := $(DEMO)/models/smollm2-135m-instruct
QUICK ?=
SMALL ?=
# An interpreter with vLLM's CUDA build; the default one is made when it is needed.
GPU_PYTHON ?= .venv-cuda/bin/python
DURATION ?= 600
# Whether a setting is given, in the environment or in .env.
given = $(or $($(1)),$(shell grep -sE '^[[:space:]]*(export[[:space:]]+)?$(1)[[:space:]]*=[[:space:]]*[^[:space:]]' .env))
DEMO_SETTINGS := $(if $(call given,LISTEN_ADDRESS),,LISTEN_ADDRESS=127.0.0.1) \
  $(if $(call given,GCS_BUCKET),,GCS_BUCKET=file://$(CURDIR)/$(DEMO) PRELOAD_MODELS=smollm2-135m-instruct)

# torch's companions do not match its CPU build and nothing here needs them.
export UV_EXCLUDE := requirements/cpu-excludes.txt
ifdef PIP_FIND_LINKS
# Wheels on a local disk.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
export UV_TORCH_BACKEND := cpu
endif

.DEFAULT_GOAL := help
.PHONY: help run model test test-fast test-slow test-gpu test-mps check format lock bench-engines bench-int8 \
  bench-lm-eval bench-serve bench-sync bench-front bench-swap bench-trace bench-adapters bench-gpu soak clean

help: ## list these targets
	@sed -nE 's/^([a-z0-9 -]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 44

# The demo's bucket, unless one is set in the environment or in .env.
run: $(if $(call given,GCS_BUCKET),$(INSTALLED),model) ## serve the demo model, or the bucket that GCS_BUCKET names
	@$(BIN)/python -m deploy.local.welcome $(if $(call given,GCS_BUCKET),,$(notdir $(DEMO_MODEL)))
	@exec env $(DEMO_SETTINGS) $(BIN)/python -m inference_service

model: $(INSTALLED) ## make the demo model in .demo/
	@$(BIN)/python -m deploy.local.demo_model $(DEMO_MODEL)

# First what computes, in as many processes as it has cores and memory for; then what waits. PYTEST_ARGS: those alone.
ENGINE_TESTS := tests/e2e tests/hosts
test: $(INSTALLED) ## run the tests, with real engines on the CPU
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ENGINE_TESTS)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 6 --dist loadfile $(addprefix --ignore ,$(ENGINE_TESTS))
endif

test-fast: $(FAST_INSTALLED) ## run the tests that need no engine, in an environment without torch
	$(FAST_VENV)/bin/python -m pytest -m "not slow" --numprocesses 4 $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow --timeout 1800 $(PYTEST_ARGS)

# On a machine with a GPU, with vLLM's CUDA build in an environment of its own, or in that of GPU_PYTHON: then
# nothing is installed, and no network is needed.
test-gpu: $(GPU_PYTHON) ## run the tests that need an NVIDIA GPU
	$(GPU_PYTHON) -m pytest -m gpu

.venv-cuda/bin/python: | $(BIN)/uv
	env -u UV_EXCLUDE -u UV_TORCH_BACKEND $(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-cuda
	env -u UV_EXCLUDE -u UV_TORCH_BACKEND $(BIN)/uv pip install --compile-bytecode --python .venv-cuda/bin/python --editable '.[cuda,transformers,dev]'

# On a Mac with Apple Silicon.
test-mps: $(INSTALLED) ## run the tests that need an Apple GPU
	$(BIN)/python -m pytest -m mps

check: $(INSTALLED) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# lm-eval wants other releases of what the service uses: an environment of its own.
bench-lm-eval: model ## compare answers with lm-eval's own engine
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lm-eval
	$(BIN)/uv pip install --quiet --python .venv-lm-eval/bin/python "lm-eval[api]==0.4.13" torch==2.13.0 \
	  transformers==5.19.0 accelerate
	$(BIN)/python -m benchmarks.lm_eval --model $(DEMO_MODEL) --lm-eval .venv-lm-eval/bin/python

bench-int8: model ## measure 8-bit weights on the CPU
	$(BIN)/python -m benchmarks.int8 --model $(DEMO_MODEL)

bench-engines: model ## measure the transformers backend
	$(BIN)/python -m benchmarks.engines --model $(DEMO_MODEL) $(if $(QUICK),--quick)

bench-serve: model ## compare throughput with vLLM's own server (QUICK=1: a short run)
	$(BIN)/python -m benchmarks.serve --model $(DEMO_MODEL) $(if $(QUICK),--quick)

bench-sync: $(INSTALLED) ## compare downloads with other tools (QUICK=1)
	$(BIN)/python -m benchmarks.sync $(if $(QUICK),--quick)

bench-front: $(INSTALLED) ## measure what the front end costs (QUICK=1)
	$(BIN)/python -m benchmarks.front $(if $(QUICK),--quick)

bench-swap bench-trace bench-adapters: bench-%: $(INSTALLED) ## measure swaps, a trace, adapters (QUICK=1)
	$(BIN)/python -m benchmarks.$* $(if $(QUICK),--quick)

bench-gpu: $(if $(SMALL),$(INSTALLED),$(GPU_PYTHON)) ## measure what a GPU does, in ten minutes (SMALL=1: here)
	$(if $(SMALL),$(BIN)/python,$(GPU_PYTHON)) -m benchmarks.gpu $(if $(SMALL),--small)

soak: $(INSTALLED) ## run mixed load and faults for DURATION seconds
	$(BIN)/python -m benchmarks.soak --duration $(DURATION)

lock: $(BIN)/uv ## resolve the pinned requirements again
	$(BIN)/uv pip compile --python $(BIN)/python pyproject.toml --extra cpu --extra transformers --extra dev \
	  --output-file requirements/dev-cpu.txt
	$(BIN)/uv pip compile --python $(BIN)/python pyproject.toml --extra transformers --extra dev \
	  --output-file requirements/dev-transformers.txt
	env -u UV_EXCLUDE -u UV_TORCH_BACKEND $(BIN)/uv pip compile --universal --python-version 3.11 pyproject.toml \
	  --extra dev --output-file requirements/dev-fast.txt
	env -u UV_TORCH_BACKEND MACOSX_DEPLOYMENT_TARGET=14.0 $(BIN)/uv pip compile \
	  --python-platform aarch64-apple-darwin --python-version 3.11 pyproject.toml --extra transformers \
	  --extra dev --output-file requirements/dev-macos.txt

clean: ## remove environments, the demo model and caches
	rm -rf $(VENV) $(FAST_VENV) .venv-cuda .venv-lm-eval $(DEMO) .cache .mypy_cache .ruff_cache .pytest_cache

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed, as '$(PYTHON)' (or: make PYTHON=/path/to/python3.12)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(INSTALLED): $(REQUIREMENTS) pyproject.toml | $(BIN)/uv
	@echo "Installing, and compiling 20,000 files once, which takes a minute or two."
	@# Compiled once here: a process may not be allowed to, and compiling is most of an import.
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python $(REQUIREMENTS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(FAST_INSTALLED): requirements/dev-fast.txt pyproject.toml | $(BIN)/uv
	env -u UV_TORCH_BACKEND $(BIN)/uv venv --quiet --clear --python $(PYTHON) $(FAST_VENV)
	env -u UV_TORCH_BACKEND $(BIN)/uv pip sync --quiet --compile-bytecode --python $(FAST_VENV)/bin/python requirements/dev-fast.txt
	env -u UV_TORCH_BACKEND $(BIN)/uv pip install --quiet --python $(FAST_VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@
