# Every target makes the virtual environment it needs; a second run finds it ready.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
TESTS ?=
BENCH ?=
N ?= 200

.PHONY: demo test lint check bench bench-prismatic bench-prism bench-constellation bench-decode bench-keep fuzz clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n auto $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

bench: $(READY)
	$(BIN)/python benchmarks/check_speed.py

# Prismatic routers against the published forms; about eight minutes on a GPU, an hour on two cores.
bench-prismatic: $(READY)
	$(BIN)/python benchmarks/prismatic.py --out build/prismatic $(BENCH)

# Fitted adapters beside dense layers; about a minute on a GPU, ten on two cores.
bench-prism: $(READY)
	$(BIN)/python benchmarks/prism.py --out build/prism $(BENCH)

# The relay beside attention; about a minute on a GPU, three on two cores.
bench-constellation: $(READY)
	$(BIN)/python benchmarks/constellation.py --out build/constellation $(BENCH)

# Decoding without a cache, with ours and with transformers' Llama where that is installed; about five minutes.
bench-decode: $(READY)
	$(BIN)/python benchmarks/decode.py --out build/decode $(BENCH)

# What an upgrade costs a trained model; small without arguments, a minute on a CPU; BENCH="--features 512 …" for more.
bench-keep: $(READY)
	$(BIN)/python benchmarks/keep_weights.py $(BENCH)

# Writes N legacy programs from the grammar in tests/grammar and applies every rule to each.
fuzz: $(READY)
	$(BIN)/python -m tests.grammar.fuzz --count $(N) $(if $(SEED),--seed $(SEED)) $(if $(RULE),--rule $(RULE))

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

# torch first and in exactly this version: it decides what everything after it is built and tested against.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev,report]"
	@touch $@
