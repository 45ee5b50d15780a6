# make demo: environment, audit of the built-in VLM, report.   make test: all tests.   make check: lint, types, docs.
# make test-lowest, make test-newest: the core tests with the oldest and the newest packages.   make build: wheel, sdist.
# make docs: the documentation site, in build/site.   make tour: docs/tour.ipynb, executed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# What depends on the versions of torch and transformers, and what a user does first.
CORE := tests/model tests/engines tests/measure tests/alignment tests/auditing tests/report tests/comparison tests/shipping
NEWEST ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test check docs tour env test-lowest test-newest build
.DEFAULT_GOAL := demo

env: $(VENV)/.ready

# torch first and pinned: a looser request may pull gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "exitwise needs Python 3.11 or newer; give it with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@date +%s > .env-started
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@; echo "environment ready in $$(( $$(date +%s) - $$(cat .env-started) )) s"; rm -f .env-started

demo: env
	@$(BIN)/exitwise demo

# Two files at a time, one thread each: on two cores that is quicker than one at a time with two.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py tests/test_layers.py

# Into .venv, which the demo and the tests use too: the pages of the commands are what `exitwise --help` prints.
$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/python $(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

# docs/tour.ipynb from docs/tour.py, executed in a folder of its own; ten minutes on two cores.
tour: $(VENV)/.docs-ready
	rm -rf build/tour && mkdir -p build/tour && cp docs/tour.py build/tour/
	cd build/tour && PYTHONWARNINGS=ignore $(CURDIR)/$(BIN)/python -m jupytext --quiet --set-kernel python3 --to ipynb --execute tour.py
	mv build/tour/tour.ipynb docs/tour.ipynb

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python $(PIP) -c constraints-lowest.txt "$$(grep '^torch==' constraints-lowest.txt)"
	.venv-lowest/bin/python $(PIP) -c constraints-lowest.txt -e '.[test]'
	@touch $@

# 5.5 GB on Linux: the newest torch comes with CUDA.
.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) $(NEWEST)
	.venv-newest/bin/python $(PIP) $(NEWEST) -e '.[test,vision]'
	@touch $@

# -rs prints what was skipped, and why.
test-lowest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pip freeze --exclude-editable | grep -iE '^(torch|torchvision|transformers|peft|accelerate|numpy|huggingface.hub)='
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 --dist loadfile -rs -m "not testbed and not slow" $(CORE)

build: env
	rm -rf dist build
	$(BIN)/python -m build --quiet
	@ls -l dist
