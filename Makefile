# make demo   fetch a small real model, quantise it, and ask it a question at 8, 6, 4, 3 and 2 bits
# make test   run the whole suite
# make gpu-check   all that this machine's CUDA GPU can show, about 8 minutes; $(PYTHON) must have torch and .[dev]
# The first two make their own virtual environment in $(VENV). TORCH chooses the build: make test TORCH=torch==2.13.0
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
MODEL ?= build/SmolLM2-135M-Instruct
BIN = $(VENV)/bin

.PHONY: demo test lint gpu-check clean

demo: $(VENV)/ready $(MODEL)/config.json
	$(BIN)/python examples/demo.py $(MODEL) --out build/demo.json

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A part alone: make gpu-check PARTS=call. The part generate needs $(NESTED), which make demo makes
PARTS ?= tests script checks sanitizer call compile bench ratios generate
NESTED ?= $(MODEL)-MatGPTQ

gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py --only $(PARTS) $(if $(wildcard $(NESTED)),--model $(NESTED))

# torch goes first and alone, so that the build that $(TORCH) names is the one that stays
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

$(MODEL)/config.json: $(VENV)/ready
	$(BIN)/python examples/fetch_smollm2.py $(MODEL)

clean:
	rm -rf $(VENV) build
