PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Idle OpenMP threads sleep instead of spinning: several times faster where the cores are shared.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help install quickstart test test-slow test-compatibility style quality clean

help:
	@echo "make quickstart   encode and decode photographs with a small tokenizer"
	@echo "make test         fast tests"
	@echo "make test-slow    slow tests"
	@echo "make test-compatibility   diffusers' own tests, from the copy that DIFFUSERS_TESTS names"
	@echo "make style        format, and fix what can be fixed"
	@echo "make quality      check format, lint and types"
	@echo "make clean        remove builds and caches; $(VENV) stays"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dinotok needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing torch (the largest download)"
	@$(PIP) install -c constraints.txt torch
	@echo "Installing dinotok and its tools (about 80 packages)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/dinotok quickstart

# Tests never use the network; one thread per worker.
test test-slow test-compatibility: export HF_HUB_OFFLINE = 1
test test-slow test-compatibility: export OMP_NUM_THREADS = 1

test: $(INSTALLED)
	$(BIN)/pytest -n $(JOBS)

test-slow: $(INSTALLED)
	$(BIN)/pytest -n $(JOBS) -m slow

# diffusers' own tests on our models: DIFFUSERS_TESTS names a folder with a copy of them (see tests/compatibility).
test-compatibility: $(INSTALLED)
	$(PIP) install parameterized requests-mock
	$(BIN)/pytest tests/compatibility -o addopts= --import-mode=importlib -W ignore

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
