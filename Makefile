# The two commands a newcomer needs are `make demo` and `make test`; both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
# Two workers on two cores; each test computes on one thread, so that they do not fight over cores. Tests of several processes
# run on one of them.
TESTS ?= -n 2 --dist loadgroup
# What `make benchmark` is asked for; `make benchmark BENCHMARK=--quick` shows that it runs.
BENCHMARK ?= --json benchmarks/results/local.json --plots benchmarks/results/local

# Tests that `make oldest` runs: between them they use every dependency that pyproject.toml bounds from below.
# cli: typer, rich, tqdm, matplotlib, scikit-learn; solve, operands: SciPy and NumPy; per sample: backpack; tensors: optree and
# psutil; resume: safetensors; chunked: kept products and large outputs.
OLDEST_TESTS ?= tests/expr tests/registry tests/cli tests/solve tests/losses tests/tensors tests/problem/layers/test_per_sample.py \
	tests/lowering/test_operands.py tests/lowering/sweeps/test_chunked.py tests/estimate/test_trace.py \
	tests/estimate/test_resume.py tests/estimate/test_pictures.py

.PHONY: demo test test-models benchmark docs lint types doctest contracts check oldest dist clean

demo: $(VENV)/.demo
	$(VENV)/bin/curvalg eigs "ggn + 1e-3 * identity" --problem digits --k 10 --plot demo.png

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) pytest $(TESTS)
	$(if $(findstring tests/,$(TESTS)),,OMP_NUM_THREADS=1 $(RUN) pytest $(TESTS) -p tests.support.simulated_gpu tests/device)

# Models of real libraries, which take a gigabyte to install; and the examples of docstrings that import one.
test-models: $(VENV)/.models
	OMP_NUM_THREADS=1 $(RUN) pytest $(TESTS) tests/models
	OMP_NUM_THREADS=1 $(RUN) pytest --doctest-modules curvalg/integrations -p no:randomly

benchmark: $(VENV)/.benchmark
	$(RUN) benchmarks $(BENCHMARK)

# Warnings are errors. CURVALG_DOCS_INTERSPHINX=1 links to the documentation of torch, SciPy and NumPy, which takes a network.
docs: $(VENV)/.docs
	$(VENV)/bin/python docs/checks/draw.py docs/images/architecture.svg
	OMP_NUM_THREADS=1 $(RUN) sphinx -b html -n -W --keep-going -q docs docs/_build/html
	$(VENV)/bin/python docs/checks/figures.py docs/_build/html
	$(VENV)/bin/python docs/checks/links.py docs/_build/html

lint: $(VENV)/.test
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.test
	$(RUN) mypy

doctest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) pytest --doctest-modules curvalg curvalg_plugins -p no:randomly

contracts: $(VENV)/.test
	$(VENV)/bin/lint-imports

check: lint types contracts doctest

# The oldest versions that pyproject.toml promises to work with, but for torch. What they import may be newer than they are and
# deprecate what they use, which is no fault of ours.
oldest: $(VENV)-oldest/.done
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(TESTS) -W ignore::DeprecationWarning $(OLDEST_TESTS)

# A wheel in dist/, installed into an environment of its own beside nothing of the checkout, and used there.
dist: $(VENV)/.test
	rm -rf build dist $(VENV)-dist
	$(RUN) pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-dist/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && $(CURDIR)/$(VENV)-dist/bin/python -I $(CURDIR)/docs/checks/wheel.py *.whl

# torch goes first and by its exact pin: resolved together with the rest, pip may pick a larger build of it.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt torch
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.models: $(VENV)/.test
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[models]"
	touch $@

$(VENV)/.benchmark: $(VENV)/.demo
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[benchmark]"
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(RUN) pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(VENV)-oldest/.done: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints.txt torch \
		pytest pytest-xdist pytest-randomly hypothesis
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[demo]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-dist build dist *.egg-info docs/_build docs/_generated docs/gallery
