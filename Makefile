# Each target makes its own virtual environment, installs what it needs once, and runs.
#   VENV=DIR   where that environment lies; VENV= (empty): use PYTHON as it is, install nothing
#   ARGS=...   handed to the command: make distill ARGS="quick=true", make test ARGS="-k cka"

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

ifdef VENV
python := $(or $(wildcard $(abspath $(VENV))/bin/python),$(PYTHON))
run := $(VENV)/bin/
runtime := $(VENV)/.installed
test := $(VENV)/.installed-test
lint := $(VENV)/.installed-lint
else
python := $(PYTHON)
run := $(PYTHON) -m #
endif
now := $(shell date +%Y%m%d-%H%M%S)

.PHONY: help distill test test-all bench gpu lint clean
.NOTPARALLEL:  # two pips in one environment break each other

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

distill: $(runtime)  ## distil a small student from a real teacher, and show what it bought
	$(run)kdfast distill quickstart $(ARGS)

test: $(test)  ## the tests, without the exhaustive matrix and the GPU tests
	$(run)pytest $(ARGS)

test-all: $(test)  ## every test; those that need a GPU run where there is one
	$(run)pytest -m "" $(ARGS)

bench: $(runtime)  ## the benchmarks' CPU set, about ten minutes: JSON, tables and plots in runs/bench
	$(run)kdfast bench --device cpu --json runs/bench/cpu-$(now)/results.json \
		--report runs/bench/cpu-$(now) $(ARGS)

# The files with GPU tests; others import packages that such a machine need not have.
gpu_tests := $(addprefix $(CURDIR)/tests/,csrc kernels benchmarks ops/test_kernels.py)

# Installs nothing and needs no network: torch, triton and pytest are all that PYTHON must have. What
# an installation would hold is built into build/gpu, where kernels and benchmarks lie in kdfast as
# they should. The benchmarks run also when a test failed; either fails the target.
gpu:  ## on a CUDA machine: build, run the GPU tests, measure the benchmarks' CUDA set
	@$(python) -c "import torch; assert torch.cuda.is_available(), 'PyTorch sees no CUDA device here'"
	rm -rf build/gpu
	$(python) setup.py --quiet build --build-lib build/gpu
	cd build/gpu && export PYTHONPATH=$(CURDIR)/build/gpu && \
	{ $(python) -m pytest -c $(CURDIR)/pyproject.toml -m gpu $(gpu_tests); tested=$$?; \
	$(python) -m kdfast bench --device cuda --json $(CURDIR)/runs/bench/cuda-$(now)/results.json \
		--report $(CURDIR)/runs/bench/cuda-$(now) $(ARGS) && exit $$tested; }

lint: $(lint)  ## ruff (rules and format) and mypy
	$(run)ruff check .
	$(run)ruff format --check .
	$(run)mypy

clean:  ## remove build outputs and caches; the environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find kdfast kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so a failed step is tried again by the next call.
# torch comes first and the project is built against it, hence no build isolation.
# No warnings of conflicts: they would be those of the demo's packages, of which only files are read.
pip := $(VENV)/bin/pip --disable-pip-version-check install --no-warn-conflicts -c constraints.txt
project := $(pip) --no-build-isolation --editable

sources := $(wildcard csrc/*.h csrc/*/*)

$(runtime): pyproject.toml setup.py constraints.txt requirements-demo.txt $(sources)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(pip) torch "setuptools>=77" wheel ninja
	$(pip) --no-deps --requirement requirements-demo.txt
	$(project) .
	touch $@

$(test): $(runtime)
	$(project) ".[test]"
	$(pip) repsim || echo "repsim needs a C++ compiler; the test that uses it is skipped"
	touch $@

$(lint): $(runtime)
	$(project) ".[lint]"
	touch $@
