# Everything a fresh machine with Python 3.11+ and make needs. `make run` and `make test` are the README's two commands.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The CPU build here; pyproject.toml allows the wider range (a GPU machine brings its own torch).
TORCH  ?= torch==2.13.0

.PHONY: run test test-slow lint docs gpu clean

run: $(VENV)/.run
	$(BIN)/moesaic run $(or $(ARGS),--resident 0.4 --verify)

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/moesaic systems --markdown > docs/systems.md

# Runs in the machine's own environment: its torch, triton and transformers are the ones to measure.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/gpu $(ARGS)
	mkdir -p $${OUT:-build}
	PYTHONPATH=src $(PYTHON) -m moesaic bench layer --device cuda --json > $${OUT:-build}/bench-layer-gpu.json
	PYTHONPATH=src $(PYTHON) -m moesaic bench stream-gpu --json > $${OUT:-build}/bench-stream-gpu.json

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[cpu]"
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
