# make demo   fetch a small real model, quantise it, and ask it a question at 8, 6, 4, 3 and 2 bits
# make test   run the whole suite
# Both make their own virtual environment in $(VENV). TORCH chooses the build: make test TORCH=torch==2.13.0
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
MODEL ?= build/SmolLM2-135M-Instruct
BIN = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/ready $(MODEL)/config.json
	$(BIN)/python examples/demo.py $(MODEL)

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
