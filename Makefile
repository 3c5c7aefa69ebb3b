# Everything runs in a virtual environment of its own, .venv, built on first use from nothing but
# a Python with pip. `make PYTHON=python3.12 test` picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := tests/constraints.txt
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

export PYTHONUNBUFFERED := 1

.DELETE_ON_ERROR:
.PHONY: help test test-slow test-torch demo bench-quick lint format clean

help:
	@echo "make test       the tests (all but the slow ones) and the doctests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-torch TORCH=2.9.1   the rules', the surgeon's and the zoo's tests on that release"
	@echo "make demo       prune a small model end to end; writes out/demo"
	@echo "make bench-quick  a small sample of every benchmark, some minutes"
	@echo "make lint       ruff check, ruff format --check, mypy"
	@echo "make format     let ruff fix and format"
	@echo "make clean      remove .venv, caches and outputs"

# A process per core, one thread each: more threads wait for one another.
test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# Another release of PyTorch, in an environment of its own beside .venv.
TORCH ?= 2.9.1
ACROSS := tests/test_rules.py tests/test_surgeon.py tests/test_zoo.py

test-torch: .venv-torch-$(TORCH)/.stamp
	.venv-torch-$(TORCH)/bin/python -m pytest -n auto --dist worksteal -p no:cacheprovider $(ACROSS)

.venv-torch-%/.stamp: pyproject.toml $(CONSTRAINTS)
	$(MAKE) VENV=.venv-torch-$* .venv-torch-$*/.stamp-venv
	grep -vE '^(torch|torchvision)==' $(CONSTRAINTS) > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install -qq --disable-pip-version-check \
		-c .venv-torch-$*/constraints.txt torch==$* -e . pytest pytest-xdist hypothesis
	@touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/python -m benchmarks.demo --out out/demo

# A small sample of every benchmark; none writes to the committed tables.
bench-quick: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.quick

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-torch-* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip: there the interpreter's own pip fills the venv.
$(VENV)/.stamp-venv:
	$(PYTHON) -m venv --clear $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@touch $@

# The demo needs little; who has everything for the tests has that as well.
$(VENV)/.stamp-demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/.stamp-venv
	@echo "Installing Prunus and what the demo needs into $(VENV) ..."
	$(INSTALL) -e '.[plot]' torch-pruning
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.stamp-venv
	@echo "Installing Prunus and everything for its tests into $(VENV); a few minutes ..."
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.stamp-demo
