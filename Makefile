# Works with nothing installed but Python 3.11 and make. A stamp file in the virtual environment
# says what is installed there, so that a second call installs nothing.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
WORKERS ?= 2
# Where the data of the benchmarks is.
DATA ?= data
# Tests run side by side, each on one thread; those of a file one after the other, since they share
# what takes long to make. Headless drawing, no hub.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=agg HF_HUB_OFFLINE=1

.PHONY: help demo test slow check bench docs clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) \
	  else "offramp needs Python 3.11 or later, found %d.%d; make PYTHON=/path/to/python3.11" % v[:2])'
	"$(PYTHON)" -m venv $(VENV)

# torch goes first and alone: the release that constraints.txt names, and no other.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing offramp into $(VENV)"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: requirements-test.txt requirements-vision.txt $(VENV)/.installed
	@echo "installing the test tools into $(VENV)"
	$(PIP) -r requirements-test.txt
	@rm -rf $(VENV)/vision
	$(PIP) --no-deps --target $(VENV)/vision -r requirements-vision.txt
	@touch $@

demo: $(VENV)/.installed  ## train, calibrate, run and measure an early-exit network on real data
	$(BIN)/offramp demo $(ARGS)

test: $(VENV)/.installed-test  ## the tests but for the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

slow: $(VENV)/.installed-test  ## the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(VENV)/.installed-test  ## style, types, the import contract, the figures in the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/tables.py --check

bench: $(VENV)/.installed-test  ## run the benchmarks; each writes a JSON into benchmarks/results
	$(BIN)/python benchmarks/digits.py --out benchmarks/results/digits.json $(ARGS)
	$(BIN)/python benchmarks/coverage.py --json benchmarks/results/coverage.json
	$(BIN)/python benchmarks/runtime.py --data $(DATA) --json benchmarks/results/runtime.json
	$(BIN)/python benchmarks/decide.py --data $(DATA) --json benchmarks/results/decide.json
	$(BIN)/python benchmarks/learn.py --data $(DATA) --json benchmarks/results/learn.json
	$(BIN)/python benchmarks/zoo.py --data $(DATA) --json benchmarks/results/zoo.json
	$(BIN)/python benchmarks/quantisation.py --data $(DATA) \
	  --json benchmarks/results/quantisation.json

docs: $(VENV)/.installed-test  ## write the tables from the results, run the code of the documents
	$(BIN)/python benchmarks/tables.py
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_readme.py

clean:  ## remove the virtual environment, caches and runs
	rm -rf $(VENV) runs dist htmlcov .coverage .mypy_cache .ruff_cache .pytest_cache \
	  .hypothesis .import_linter_cache lightning_logs
	find . -name __pycache__ -prune -exec rm -rf {} +
