# make quickstart: set up, train the first grid, evaluate it, print its table.
# make test:       set up, lint, run the fast tests.
# make test-slow:  the rest of the tests.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test test-slow lint setup

setup: $(VENV)/.ready

# The stamp is written last: an interrupted set-up is done again.
$(VENV)/.ready: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/python -m launch.submit --config=experiments/quickstart.py --backend=local --parallel=2
	$(BIN)/python -m moe_jax.evaluate --config=experiments/quickstart.py

lint: setup
	$(BIN)/ruff check .

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

# The TPU compiler, apart from JAX: beside it, every start of JAX would look for a TPU.
$(VENV)/.libtpu: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu \
		"$$($(BIN)/python -m tests.plan.libtpu)"
	touch $@

test-slow: setup $(VENV)/.libtpu
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests
