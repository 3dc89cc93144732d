# make quickstart: set up, train the first grid, evaluate it, print its table.
# make test:       set up, lint, run the fast tests.
# make test-slow:  the rest of the tests.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# A worker that dies is not replaced: xdist would lose count of its files and wait for ever.
XDIST := -n 2 --dist loadfile --max-worker-restart=0

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
	$(BIN)/python -m pytest $(XDIST) -m "not slow" tests

# The TPU compiler, apart from JAX: beside it, every start of JAX would look for a TPU.
$(VENV)/.libtpu: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu \
		"$$($(BIN)/python -m tests.plan.libtpu)"
	touch $@

# transformers, twice, torch and lm-eval, apart from all else: what exported models are compared
# with. On Linux PyPI's torch is the one for GPUs; TORCH='--index-url=... torch==...' takes another.
TORCH ?= torch==2.13.0
$(VENV)/.transformers: $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)/transformers
	$(VENV)/transformers/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/transformers/bin/python -m pip install --quiet 'transformers>=5.23,<6' safetensors
	$(VENV)/transformers/bin/python -m pip install --quiet --editable '.[eval]' 'lm-eval[hf]'
	$(VENV)/transformers/bin/python -m pip install --quiet --upgrade \
		--target $(VENV)/transformers/4.57 'transformers==4.57.*'
	touch $@

test-slow: setup $(VENV)/.libtpu $(VENV)/.transformers
	$(BIN)/python -m pytest $(XDIST) -m slow tests
