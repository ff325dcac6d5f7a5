# make demo       see the dial turn on real data            make test       lint, types, doctests, tests
# make test-all   adds what is slow or needs a browser      make format     let ruff rewrite what it can
# make bench      time and memory against Dropout           make docs       the site, into site/
# make dist       both distributions, as published, into dist/
# Each does all of its own set-up. PIP_ARGS= goes to pip (an index with CPU builds, say), ARGS= to `sparseout demo` or
# `sparseout bench`.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
export PYTHON PIP_ARGS

OPERATION = tests/kernels/test_ops.py tests/kernels/test_cpu.py tests/test_functional.py tests/test_functional_masks.py \
	-k "not mean_and_variance and not rate_of_the_mask and not opcheck"

.PHONY: demo bench docs lint types test test-slow test-all format dist clean

demo: .venv/.experiments
	@.venv/bin/sparseout demo $(ARGS)

bench: .venv/.experiments
	@.venv/bin/sparseout bench $(ARGS)

docs: .venv/.docs
	@PYTHONPATH=tools NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/codespell

types: .venv/.dev
	.venv/bin/mypy

# By file, so that what the tests of one share is made once. Bytecode is kept, that of tests too.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n 2 --dist loadfile

# The operation a second time without the native kernel, as where there was no compiler.
test: lint types
	$(PYTEST) -m "not slow"
	SPARSEOUT_BACKEND=torch $(PYTEST) -m "not slow" -q $(OPERATION)

test-slow: .venv/.dev
	@tools/browser
	$(PYTEST) -m slow

test-all: test test-slow

format: .venv/.dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# `dev` includes the others, so whoever runs the tests first has the demo and the site installed too.
.venv/.experiments: pyproject.toml experiments/pyproject.toml constraints.txt $(wildcard src/sparseout/kernels/*.c)
	@tools/setup experiments
	@touch $@

.venv/.docs: pyproject.toml experiments/pyproject.toml constraints.txt $(wildcard src/sparseout/kernels/*.c)
	@tools/setup docs
	@touch $@

.venv/.dev: pyproject.toml experiments/pyproject.toml constraints.txt $(wildcard src/sparseout/kernels/*.c)
	@tools/setup dev
	@touch $@ .venv/.experiments .venv/.docs

dist:
	rm -rf build dist
	@$(PYTHON) -m venv build/tools && build/tools/bin/pip install --quiet --disable-pip-version-check build twine
	build/tools/bin/python -m build --outdir dist
	build/tools/bin/python -m build --outdir dist experiments
	build/tools/bin/twine check --strict dist/*

clean:
	rm -rf .venv build demo bench dist site
