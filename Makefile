# Needs Python 3.11 or later, git and make. `make` alone lists what there is.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Named apart because it goes first: a bare or ranged `torch` can bring a newer release with several GB of CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)
# pip compiles on one core, which takes longer than the rest of its work: `venv` compiles on all of them instead.
# (Some packages ship files that are not meant to compile.)
INSTALL := pip install --no-compile --progress-bar off -c constraints.txt
CHECK := build/wheel-check

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-oldest lint types docs wheel-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(INSTALLED)  ## set up .venv with both backends (once, and again when the dependencies change)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ppl_lvm needs Python 3.11 or later; $(PYTHON) is older or missing. Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) $(TORCH)
	$(BIN)/$(INSTALL) -e '.[all,dev,docs]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: venv  ## fit a VAE to handwritten digits, two recipes on two backends, and compare them
	$(BIN)/ppl-lvm demo

lint: venv  ## ruff
	$(BIN)/ruff check .

types: venv  ## mypy
	$(BIN)/mypy

# Tests run in $(WORKERS) processes of one thread each: the cores are full then, and small arrays gain nothing from more.
test test-all test-oldest: export OMP_NUM_THREADS := 1
test test-all test-oldest: export MKL_NUM_THREADS := 1
test test-all test-oldest: export OPENBLAS_NUM_THREADS := 1
test test-all test-oldest: export NPROC := 1
test test-all test-oldest: export TORCHINDUCTOR_COMPILE_THREADS := 1
test test-all test-oldest: export JAX_PLATFORMS ?= cpu
test test-all test-oldest: export MPLBACKEND := agg
# worksteal hands out neighbouring tests together, so what one of them compiled serves the next.
SPREAD := -n $(WORKERS) --dist worksteal --durations=15
PYTEST := $(BIN)/pytest $(SPREAD)

test: lint types  ## lint, types and the fast tests
	$(PYTEST) -m 'not slow'

test-all: lint types  ## the same with the slow tests
	$(PYTEST)

# What users call, on both backends: recipes, programs, data, fits, evaluations, folders, reports. The rest of the suite
# looks at what does not depend on versions (errors of our own, each cell that `parity` has compared on both backends),
# or at a newer flax. An old library warns of newer ones that it uses: no error here.
OLDEST := build/oldest
INSTALL_OLDEST := pip install --no-compile --progress-bar off -c $(OLDEST)/constraints.txt
OLDEST_TOOLS := arviz-plots hypothesis packaging pandas pyarrow pytest pytest-xdist
OLDEST_TESTS := recipe program data datasets fit loop methods posterior nets parity saving store to_arviz report disentanglement cli

test-oldest: venv  ## fast tests of what users call with the lowest versions that pyproject.toml declares (torch as tested)
	mkdir -p $(OLDEST)
	$(BIN)/python .ci/oldest.py > $(OLDEST)/constraints.txt
	test -x $(OLDEST)/venv/bin/python || $(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST)/venv/bin/$(INSTALL_OLDEST) $(TORCH)
	$(OLDEST)/venv/bin/$(INSTALL_OLDEST) '.[all]' $(OLDEST_TOOLS)
	$(OLDEST)/venv/bin/pip uninstall -q -y ppl_lvm
	$(OLDEST)/venv/bin/python -m pytest $(SPREAD) -m 'not slow' -W default::DeprecationWarning $(OLDEST_TESTS:%=tests/test_%.py)

docs: export OMP_NUM_THREADS := 1
docs: export MKL_NUM_THREADS := 1
docs: export JAX_PLATFORMS ?= cpu
docs: venv  ## build the documentation to build/docs/html; its tutorials run (not with SPHINX="-D nb_execution_mode=off")
	$(BIN)/python -m sphinx -E -W --keep-going -q $(SPHINX) -b html docs build/docs/html
	@echo "Wrote build/docs/html/index.html"

wheel-check: venv  ## build the wheel, install it alone with NumPyro only, fit from there
	rm -rf $(CHECK)
	$(BIN)/python -m build --outdir $(CHECK)/dist .
	$(PYTHON) -m venv $(CHECK)/venv
	$(CHECK)/venv/bin/$(INSTALL) "$$(ls $(CHECK)/dist/*.whl)[numpyro]"
	$(CHECK)/venv/bin/python -I .ci/wheel_check.py .
	rm -rf $(CHECK)/venv

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
