# Works from a fresh clone with Python 3.11 or newer and make. `make` alone says what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BATON_PORT ?= 8000
DEMO_MODEL := deploy/demo/model
BATON_MODEL ?= $(DEMO_MODEL)
# One more than there are cores, since many tests wait; each may need some gigabytes.
TEST_PROCESSES ?= $(shell n=$$(( $$(nproc) + 1 )); echo $$(( n < 8 ? n : 8 )))
CHAOS_S ?= 600
CHAOS_SEED ?=

# A GPU gets the torch that its driver runs, everything else the one without.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),constraints-cuda.txt,constraints.txt)
EXTRA_INDEX := $(if $(BATON_TORCH_INDEX),--extra-index-url $(BATON_TORCH_INDEX))

.PHONY: help setup serve test check chaos bench-cpu clean

help:
	@echo "make setup      a virtual environment in $(VENV) with everything needed"
	@echo "make serve      serve BATON_MODEL ($(BATON_MODEL)) at BATON_PORT ($(BATON_PORT))"
	@echo "make test       all tests that this machine can run"
	@echo "make check      linter, types, rules of the code base"
	@echo "make chaos      kill and stop processes under load for CHAOS_S ($(CHAOS_S)) seconds, check every token"
	@echo "make bench-cpu  router, chat templates, scheduler and mover by the clock, without a GPU"
	@echo "make clean      remove caches and build outputs; 'rm -r $(VENV)' removes the environment"

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is missing or older than 3.11; install Python 3.11 or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(EXTRA_INDEX) -c $(CONSTRAINTS) -e '.[dev,bench]'
	@touch $@

serve: $(STAMP)
	@BATON_PORT=$(BATON_PORT) $(BIN)/baton serve $(BATON_MODEL) $(if $(filter $(DEMO_MODEL),$(BATON_MODEL)),--served-model-name baton-demo)

# Files come in the order of tests/conftest.py: the longest first, so that the last ones to run are short.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/rules

chaos: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --seconds $(CHAOS_S) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

bench-cpu: $(STAMP)
	$(BIN)/python -m deploy.bench.engine.scheduler
	$(BIN)/python -m deploy.bench.router.router
	$(BIN)/python -m deploy.bench.router.stalls
	$(BIN)/python -m deploy.bench.router.templates
	$(BIN)/python -m deploy.bench.transfer.mover

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
