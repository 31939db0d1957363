# The only commands: make run | test | check | model | bench-serve | lock. Each does its own set-up.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements/dev-cpu.txt
INSTALLED := $(VENV)/.installed
DEMO := .demo
DEMO_MODEL := $(DEMO)/models/smollm2-135m-instruct
QUICK ?=

# torch's companions do not match its CPU build and nothing here needs them.
export UV_EXCLUDE := requirements/cpu-excludes.txt
ifdef PIP_FIND_LINKS
# Wheels on a local disk.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
export UV_TORCH_BACKEND := cpu
endif

.PHONY: run model test check format lock bench-serve clean

run: model
	@port=$${PORT:-8080}; printf '%s\n' \
	  '' "Talk to it, at http://127.0.0.1:$$port (Ctrl-C ends it):" '' \
	  "  curl http://127.0.0.1:$$port/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"smollm2-135m-instruct\", \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]}'" '' \
	  '  $(BIN)/python -c '"'"'' \
	  '  from openai import OpenAI' \
	  "  client = OpenAI(base_url=\"http://127.0.0.1:$$port/v1\", api_key=\"none\")" \
	  '  question = {"role": "user", "content": "What is the capital of France?"}' \
	  '  answer = client.chat.completions.create(model="smollm2-135m-instruct", messages=[question])' \
	  '  print(answer.choices[0].message.content)'"'"'' ''
	@exec env GCS_BUCKET="$${GCS_BUCKET:-file://$(CURDIR)/$(DEMO)}" \
	  LISTEN_ADDRESS="$${LISTEN_ADDRESS:-127.0.0.1}" PRELOAD_MODELS="$${PRELOAD_MODELS-smollm2-135m-instruct}" \
	  $(BIN)/python -m inference_service

model: $(INSTALLED)
	@$(BIN)/python -m deploy.local.demo_model $(DEMO_MODEL)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-serve: model
	$(BIN)/python -m benchmarks.serve --model $(DEMO_MODEL) $(if $(QUICK),--quick)

lock: $(BIN)/uv
	$(BIN)/uv pip compile --python $(BIN)/python pyproject.toml --extra cpu --extra transformers --extra dev \
	  --output-file $(REQUIREMENTS)

clean:
	rm -rf $(VENV) $(DEMO) .cache .mypy_cache .ruff_cache .pytest_cache

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed, as '$(PYTHON)' (or: make PYTHON=/path/to/python3.11)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(INSTALLED): $(REQUIREMENTS) pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --python $(BIN)/python $(REQUIREMENTS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
