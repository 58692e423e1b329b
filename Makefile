# `make demo` and `make test` are all the set-up: they make the environment themselves.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Compiling every module of every package at once takes longer than compiling those that are used, when they are.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: install demo test test-slow faults check format clean

install: $(READY)

# torch first and by pip: its CPU build satisfies everything that follows.
$(READY): pyproject.toml constraints.txt requirements-quickstart.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps --requirement requirements-quickstart.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/stillroom distill recipes/quickstart.yaml --out runs/quickstart

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 7200

faults: $(READY)
	$(BIN)/python -m benchmarks.checkpoint.faults

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
