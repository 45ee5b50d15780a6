# make demo: environment, audit of the built-in VLM, report.   make test: all tests.   make check: lint, types, docs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check env
.DEFAULT_GOAL := demo

env: $(VENV)/.ready

# torch first and pinned: a looser request may pull gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "exitwise needs Python 3.11 or newer; give it with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@date +%s > .env-started
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@; echo "environment ready in $$(( $$(date +%s) - $$(cat .env-started) )) s"; rm -f .env-started

demo: env
	@$(BIN)/exitwise demo

# Two files at a time, one thread each: on two cores that is quicker than one at a time with two.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py tests/test_layers.py
