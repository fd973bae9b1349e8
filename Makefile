# Each target sets itself up: a machine with Python 3.11 or newer and make needs nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow test-gpu bench bench-gpu lint format clean

install: $(READY)  ## Set up the environment in .venv; the other targets do so too

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11")'
	@echo "Setting up $(VENV): one to four minutes, about 2 GB with torch for the CPU"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## Run the commands of experiments/demo.yaml: a tokenizer, a decoder, a sample
	sed -n 's/^- //p' experiments/demo.yaml | PATH="$(CURDIR)/$(BIN):$$PATH" bash -e

test: $(READY)  ## Run the tests, which need no network, no GPU and no account
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: $(READY)  ## Run the tests that take seconds each: studies, printed commands, guides, processes that are killed
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m 'slow and not gpu and not network' --numprocesses auto --dist worksteal

test-gpu: $(READY)  ## Run the tests that need a GPU (two minutes)
	$(BIN)/python -m pytest -m gpu --numprocesses 4 --dist worksteal $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)

bench: $(READY)  ## Run the timings and fault tests that the READMEs report (minutes each)
	for benchmark in tests/benchmarks/*.py tests/*/benchmarks/*.py; do echo "## $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

bench-gpu: $(READY)  ## Measure speed and exactness on one GPU beside nanoGPT and Transformers; ARGS="--rows a,b"
	PYTHONPATH=tests $(BIN)/python -m gpu.bench $(ARGS)

lint: $(READY)  ## Check style and docstrings, one-way imports, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment; runs stay
	rm -rf $(VENV)
