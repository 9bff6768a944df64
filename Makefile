# SPDX-License-Identifier: Apache-2.0
# Everything from a clone: `make demo` and `make test` install what they need into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A worker of pytest-xdist for each core, four at most. Each computes with one thread, but for the ops' tests, which need two.
# `make test PYTEST_ARGS='-n 0'` does without workers.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
# What takes seconds: the arrows, the ops, and that the networks compute as published.
QUICK := tests/test_architecture.py tests/ops tests/models/test_layers.py $(addprefix tests/models/test_models.py::, \
	test_golden_classifier test_kernel_and_reference_agree test_every_parameter_gets_a_gradient)

.PHONY: setup demo check test test-slow test-clients docs gpu lint format clean

setup: $(INSTALLED)

# Again whenever what is installed or compiled changes; the environment itself is kept.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard ops/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "vssm needs Python 3.11 or newer, got " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[demo,docs,export,hub,mmlab,plot,test,wsi]'
	# mmengine asks for opencv-python, which needs a display library that servers lack; the headless build does not.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	touch $@

demo: $(INSTALLED)
	$(BIN)/vssm demo

check: lint
	$(PYTEST) -m 'not slow and not triton' -k 'not opcheck' --draws 30 $(QUICK) $(PYTEST_ARGS)

test: $(INSTALLED)
	$(PYTEST) -m 'not slow and not clients' $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(PYTEST_ARGS)

# Where a package index can be reached. Its environments stay in build/clients.
test-clients: $(INSTALLED)
	$(PYTEST) -m clients tests/clients $(PYTEST_ARGS)

# The site of docs/, in build/site; any warning is an error. The variable silences what the theme says of mkdocs's future.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# On a machine with a card, in minutes: its results are in benchmarks/results/gpu. `make gpu GPU_ARGS='--steps op models'`
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info src/*.egg-info ops/*.so work_dirs
