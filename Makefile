# One command for each thing one does here.  Nothing but Python (>= 3.11) and make is assumed: each
# target makes its own virtual environment, installs what it needs into it, and runs.
#
#   make train PYTHON=python3.12 ARGS='--steps 50'

PYTHON ?= python3
# One environment per Python version, so that PYTHON=python3.12 gets its own.
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ARGS ?=
PY := $(VENV)/bin/python
# The compiler for TPUs, which needs none.  Beside the packages: among them JAX would look for a TPU.
LIBTPU := $(VENV)/libtpu
WITH_LIBTPU = $$(cd $(LIBTPU) 2>/dev/null && pwd)$${PYTHONPATH:+:$$PYTHONPATH}

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint format bench install check-python clean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-10s %s\n' "  $$name" "$$text"; done

train: $(VENV)/.run.stamp ## train the small model on 2 processes x 4 emulated devices
	$(PY) -m launch.local --processes 2 --devices 4 -- \
	  -m launch.train --mesh data=2,fsdp=2,tensor=2 --preset fsdp_tp $(ARGS)

# Two groups, each in two workers; tests that start processes keep the files together whose tests
# share what they start.  What compiles for TPUs runs where libtpu can be fetched: the line before
# says whether it was, or why not.
test: $(VENV)/.test.stamp ## run all tests and every example in the docs
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not (multiprocess or gpu or tpu)" $(ARGS)
	$(PY) -m pytest -q -n 2 --dist loadfile -m "multiprocess and not (gpu or tpu)" $(ARGS) tests
	@$(PY) -m tests.tpu.fetch $(LIBTPU)
	test ! -d $(LIBTPU) || PYTHONPATH="$(WITH_LIBTPU)" $(PY) -m pytest -q -m tpu $(ARGS) tests/tpu

lint: $(VENV)/.test.stamp ## ruff check, ruff format --check, pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.test.stamp ## let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.test.stamp ## measure the overheads beside Flax's
	@$(PY) -m tests.tpu.fetch $(LIBTPU)
	PYTHONPATH="$(WITH_LIBTPU)" $(PY) benchmarks/overhead.py $(ARGS)

install: $(VENV)/.test.stamp ## make the environment for development, run nothing

clean: ## remove the environments and caches (runs/ stays)
	rm -rf .venv-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(0)' 2>/dev/null || { \
	  echo "make: cannot run '$(PYTHON)'; name a Python that is installed: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: shardflax needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1);" \
	    "name a newer one: make PYTHON=python3.12" >&2; \
	  exit 1; }

$(VENV)/.venv.stamp: | check-python
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' comes without venv; install it (Debian: apt install python3-venv)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.run.stamp: $(VENV)/.venv.stamp pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test.stamp: $(VENV)/.venv.stamp pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.run.stamp
