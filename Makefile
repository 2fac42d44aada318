# Every command is one line; `.venv` is made on first use and remade when the pins change.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-all check fmt docs bench clean

demo: $(STAMP)          ## from nothing to a served adapter that renews itself (20 to 25 minutes on 2 cores)
	$(BIN)/python examples/smart_home/demo.py

test: $(STAMP)          ## unit, contract, docs, Ray and end-to-end tests on the tiny model
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --no-loadscope-reorder

test-all: $(STAMP)      ## the slow ones and the ones for a GPU too
	$(BIN)/python -m pytest

check: $(STAMP)         ## format, lint, types, layers
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

fmt: $(STAMP)           ## write the format and the safe fixes
	$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

docs: $(STAMP)          ## write the pages that come from the code
	$(BIN)/python docs/recipe_reference.py && $(BIN)/python docs/methods_reference.py

bench: $(STAMP)         ## every benchmark, results in benchmarks/out
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json benchmarks/out/$$name.json || exit 1; done

clean:                  ## remove the environment and caches, never a home
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache *.egg-info

BENCHMARKS = $(basename $(notdir $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)
