# Everything runs in a virtual environment in the checkout: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# `make test TORCH=2.11.0`: another release of torch, in an environment of its own.
TORCH := 2.13.0
COMMA := ,
VENV := $(if $(filter 2.13.0,$(TORCH)),.venv,.venvs/$(TORCH))
BIN := $(VENV)/bin
# torchtitan needs torch 2.13; without it its tests are skipped.
EXTRAS := $(if $(filter 2.13.%,$(TORCH)),dev$(COMMA)titan,dev)
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' mdm_plugin/__init__.py)
# PyTorch's public wheels without CUDA, for where pip's own index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help install demo quick test lint types tests faults docs docs-version bench gpu study wheel clean

help:
	@echo "make demo   pretrain and fine-tune a small model on this machine, and measure it"
	@echo "make quick  lint, types and the tests that need no process of their own: a minute"
	@echo "make test   lint, types and all tests (make test TORCH=2.11.0: with another torch)"
	@echo "make faults kills, full disks, damaged files, long runs: all of tests/faults, about 10 minutes"
	@echo "make docs   the documentation as a site: build/site/index.html"
	@echo "make docs-version   that site as one of the versions on the local branch gh-pages"
	@echo "make bench  training steps side by side with a plain loop, about 40 minutes (after make demo)"
	@echo "make gpu    what needs a GPU, in parts (make gpu PART=memory-llada), then docs/gpu.md's tables"
	@echo "make study  the study of docs/study.md: what has not been run of it, then its report; hours"
	@echo "make wheel  build the wheel into dist/"
	@echo "make clean  remove the virtual environment and caches"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch comes first: a later resolution would pull the CUDA build onto a machine without a GPU.
	@# Where no build without CUDA is to be had, the other one works on a CPU too.
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install --quiet "torch==$(TORCH)"; \
	else \
		$(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/pip install --quiet "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX) 2>/dev/null \
		|| $(BIN)/pip install --quiet "torch==$(TORCH)"; \
	fi
	@# triton goes with its torch: constraints.txt pins that of its own.
	sed '$(if $(filter .venv,$(VENV)),,/^triton==/d; )s/^torch==.*/torch==$(TORCH)/' constraints.txt >$(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

demo: install
	$(BIN)/python -m mdm_plugin.quickstart.demo

test: lint types tests

quick: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --durations=5

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

tests: install
	@# One thread for each of two workers: the models are tiny.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

faults: install
	MDM_FAULTS=all $(BIN)/python -m pytest tests/faults -n 0

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

# Nothing is pushed: git push origin gh-pages does that.
docs-version: docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mike deploy --update-aliases $(VERSION) latest
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mike set-default latest

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[docs]"
	touch $@

bench: install
	$(BIN)/python benchmarks/training.py --output bench
	$(BIN)/python benchmarks/reach.py --output bench

# From the source tree, by the Python and the torch that are there; exit code 75: run it again.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU := PYTHONPATH=.:recipes $(GPU_PYTHON) -m benchmarks.gpu

gpu:
	$(GPU) $(PART) --output runs/gpu
	$(GPU) report --output runs/gpu

study: install
	$(BIN)/python -m benchmarks.study

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venvs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
