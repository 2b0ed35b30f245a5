# Two commands: `make demo` sets up and runs the main job, `make test` sets up and runs the checks that take under six minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
# The packages are installed uncompiled (below): where this were set, each process would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-all lowest newest campaign docs lint setup clean

# The demo needs no development extras: where nothing is set up yet, it waits for less.
demo: $(if $(wildcard $(VENV)/.ready),$(VENV)/.ready,$(VENV)/.runs)
	$(BIN)/python benchmarks/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long and not slow"

# The tests of some seconds each, which `.ci/run` runs after those of `make test`.
test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The fast tier with the oldest packages that pyproject.toml allows, and with the newest that there are, in an environment of its own:
# gigabytes, and half an hour.
lowest: ENDS := lowest-direct
newest: ENDS := highest
lowest newest:
	$(PYTHON) -m venv --clear $(VENV)-$@
	$(VENV)-$@/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-$@/bin/uv pip compile --quiet --all-extras --python $(VENV)-$@/bin/python --resolution $(ENDS) \
		--output-file $(VENV)-$@/packages.txt pyproject.toml
	$(VENV)-$@/bin/uv pip install --quiet --python $(VENV)-$@ --requirement $(VENV)-$@/packages.txt
	$(VENV)-$@/bin/uv pip install --quiet --python $(VENV)-$@ --no-deps --editable .
	$(VENV)-$@/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# What damaged files, kill -9 and full disks do to it: half an hour on two idle cores; rewrites benchmarks/results/faults.md.
campaign: $(VENV)/.ready
	$(BIN)/python benchmarks/faults.py

# The documentation site, into site/: every warning is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

# Python compiles each module when it is first imported; all of them at once would take as long as the rest.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) ".[dev]"
	touch $@

$(VENV)/.runs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) .
	touch $@

# Python 3.11 or later; `make PYTHON=python3.12 test` chooses another than python3.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("diffrl needs Python 3.11 or later: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
