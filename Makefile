# Every target sets up what it needs; `make setup` alone makes the .venv.
PYTHON ?= python3
DIR ?=
ARGS ?=
# Test processes; they often wait for ranks and jobs of their own, so one more than there are cores.
TEST_WORKERS ?= $(shell expr $$(nproc) + 1)

VENV := .venv
STAMP := $(VENV)/.installed
SHELL_SCRIPTS := .ci/run $(wildcard slurm/*.sbatch slurm/*.sh)
# Without what is seldom imported.
COMPILE = $(VENV)/bin/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/'
AT_LEAST_3_11 := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

.PHONY: help setup demo test test-fast test-gpu check clean

help:
	@echo "make setup   make $(VENV) with the pinned dependencies (PYTHON=python3.12 picks the interpreter)"
	@echo "make demo    the whole path on a small corpus, on CPU, about 5 minutes (DIR=folder: where)"
	@echo "make test    the whole test suite (ARGS='-k order': some of it; TEST_WORKERS=1: one test at a time)"
	@echo "make test-fast  those that need no process, rank, cluster or large model: within a minute on two cores"
	@echo "make test-gpu  the tests of a machine with a GPU: whether maskwright is right there"
	@echo "make check   lint, format, types, import rules, shell scripts"
	@echo "make clean   remove $(VENV) and all caches"

setup: $(STAMP)

# torch comes first and pinned: DeepSpeed, asked for alone, would bring the newest one.
$(STAMP): pyproject.toml constraints.txt
	@$(VENV)/bin/python $(AT_LEAST_3_11) 2>/dev/null || { \
		$(PYTHON) $(AT_LEAST_3_11) || { echo "maskwright needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }; \
		$(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing the pinned dependencies into $(VENV): a few minutes, and a large download the first time"
	@$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	@# Compiled on all cores, where pip takes one: torch while the rest is fetched. Some packages hold templates that are no Python.
	@$(COMPILE) $(VENV)/lib & $(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'; \
		installed=$$?; wait; exit $$installed
	@$(COMPILE) $(VENV)/lib launcher trainer tools || true
	@touch $@

demo: setup
	$(VENV)/bin/maskwright demo $(if $(DIR),--dir '$(DIR)')

test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --hypothesis-profile=fast $(or $(ARGS),tests/unit)

# On a machine with a GPU, which all of them share.
test-gpu: setup
	MASKWRIGHT_GPU_TESTS=1 OMP_NUM_THREADS=4 $(VENV)/bin/python -m pytest -m gpu -n 4 $(ARGS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_SCRIPTS) && echo "shellcheck: no findings"; \
	else echo "shellcheck is not installed: shell scripts were not checked" >&2; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
