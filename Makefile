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

.PHONY: help distill test test-all test-triton bench report gpu gpu-build gpu-test gpu-step gpu-sanitize lint clean
.NOTPARALLEL:  # two pips in one environment break each other

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

distill: $(runtime)  ## distil a small student from a real teacher, and show what it bought
	$(run)kdfast distill quickstart $(ARGS)

# Two processes, whose files are their own; threads that wait do not keep the other one's core.
test: $(test)  ## the tests, without the exhaustive matrix and the GPU tests
	OMP_WAIT_POLICY=PASSIVE $(run)pytest --numprocesses 2 --dist loadfile $(ARGS)

# `make test` has one in eleven of these cases, and one architecture.
test-triton: $(test)  ## more of the Triton and CUDA kernels: interpreted, and compiled ahead of time
	OMP_WAIT_POLICY=PASSIVE $(run)pytest --numprocesses 2 --dist loadfile -m "not exhaustive" \
		tests/kernels tests/benchmarks/test_tune.py tests/csrc $(ARGS)
	OMP_WAIT_POLICY=PASSIVE $(run)pytest --numprocesses 2 --dist loadfile -m "not exhaustive" \
		tests/ops -k triton $(ARGS)

test-all: $(test)  ## every test; those that need a GPU run where there is one
	$(run)pytest -m "" $(ARGS)

report: $(runtime)  ## the results in benchmarks/README.md, from the committed JSON
	$(python) -m kdfast.benchmarks.summary benchmarks

bench: $(runtime)  ## the benchmarks' CPU set, about fifteen minutes: JSON, tables and plots in runs/bench
	$(run)kdfast bench --device cpu --json runs/bench/cpu-$(now)/results.json \
		--report runs/bench/cpu-$(now) $(ARGS)

gpu_built := cd build/gpu && export PYTHONPATH=$(CURDIR)/build/gpu &&
gpu_pytest := $(python) -m pytest -c $(CURDIR)/pyproject.toml -m gpu

# What is missing is said before anything is built; the answer is the architecture to build for.
define gpu_machine
import importlib.util, sys, torch
missing = [x for x in ("setuptools", "pytest", "triton") if importlib.util.find_spec(x) is None]
if missing:
    sys.exit(f"make gpu needs {', '.join(missing)} beside PyTorch: pip install {' '.join(missing)}")
import setuptools
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools is {setuptools.__version__}, should be 77 or later: it reads pyproject.toml")
if not torch.cuda.is_available():
    sys.exit("PyTorch sees no CUDA device here")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))
endef
define gpu_library
import sys
from kdfast import doctor
found = doctor.report()
compiler, library = found["versions"]["nvcc"], found["libraries"]["kdfast/_cuda"]
if compiler and not library:
    sys.exit(f"{compiler} is here, but kdfast/_cuda was not built; the reason is above")
print("kdfast/_cuda:", library or "no nvcc, so its tests are skipped")
endef
export gpu_machine gpu_library

# Installs nothing and needs no network: torch, triton, setuptools and pytest are all that PYTHON
# must have, and nvcc for the kernels in CUDA C++. What an installation would hold is built into
# build/gpu, where kernels and benchmarks lie in kdfast as they should, for the GPU that is here
# unless TORCH_CUDA_ARCH_LIST says otherwise.
gpu-build:
	rm -rf build/gpu
	architecture=$$($(python) -c "$$gpu_machine") && \
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$architecture}" KDFAST_BUILD=cuda \
	$(python) setup.py --quiet build --build-lib build/gpu
	$(gpu_built) $(python) -c "$$gpu_library"

# The files with GPU tests; others import packages that such a machine need not have. Their time goes
# into Triton, which compiles one kernel after the other, so that several processes share them;
# build/gpu/*.log has what each one has said so far.
gpu_ladder := $(CURDIR)/tests/ops/test_kernels.py
gpu_cka := $(CURDIR)/tests/ops/test_cka_kernels.py
gpu_projection := $(CURDIR)/tests/ops/test_layer_projection_kernels.py
gpu_pairs := $(CURDIR)/tests/ops/test_layer_pairs.py
define gpu_tests
part() { log=$$1; shift; $(gpu_pytest) "$$@" > $$log.log 2>&1 || touch failed; cat $$log.log; }; \
part csrc $(CURDIR)/tests/csrc & \
part kernels $(CURDIR)/tests/kernels $(CURDIR)/tests/benchmarks & \
part ladder-cuda $(gpu_ladder) -k cuda & \
part ladder-rows $(gpu_ladder) -k "triton and rows" & \
part ladder-scalars $(gpu_ladder) -k "triton and scalar" & \
part ladder-rest $(gpu_ladder) -k "triton and not rows and not scalar" & \
part cka-cuda $(gpu_cka) -k cuda & \
part cka-gram $(gpu_cka) -k "triton and gram" & \
part cka-rest $(gpu_cka) -k "triton and not gram" & \
part projection-cuda $(gpu_projection) -k cuda & \
part pairs $(gpu_pairs) & \
part projection-rows $(gpu_projection) -k "triton and rows" & \
part projection-rest $(gpu_projection) -k "triton and not rows" & \
wait
endef
gpu-test: gpu-build  ## on a CUDA machine: build, run the GPU tests
	$(gpu_built) { $(gpu_tests); } && test ! -e failed

# The benchmarks run also when a test failed; either fails the target.
gpu: gpu-build  ## on a CUDA machine: build, run the GPU tests, measure the benchmarks' CUDA set
	$(gpu_built) { $(gpu_tests); } && \
	$(python) -m kdfast bench --device cuda --json $(CURDIR)/runs/bench/cuda-$(now)/results.json \
		--report $(CURDIR)/runs/bench/cuda-$(now) $(ARGS) && test ! -e failed

# Whole steps and the training loop need what distillation needs: transformers, datasets, accelerate.
gpu-step: gpu-build  ## on a CUDA machine with transformers: GPU tests of the loop, whole steps, growth
	$(gpu_built) { $(gpu_pytest) $(CURDIR)/tests/distill || touch failed; } && \
	for suite in step scale; do \
		$(python) -m kdfast bench $$suite --device cuda --report $(CURDIR)/runs/bench/cuda-$(now) \
			--json $(CURDIR)/runs/bench/cuda-$(now)/$$suite.json $(ARGS) || touch failed; \
	done; test ! -e failed

# Without the cache of PyTorch's allocator each tensor is an allocation of its own. initcheck must
# see the kernels that fill the inputs; the other tools look at ours alone.
gpu-sanitize: export PATH := $(PATH):/usr/local/cuda/bin
gpu-sanitize:  ## on a CUDA machine: compute-sanitizer over a few tests of the CUDA C++ kernels
	@command -v compute-sanitizer > /dev/null || \
		{ echo "compute-sanitizer is not on the path; it is part of the CUDA toolkit"; exit 1; }
	$(MAKE) gpu-build
	$(gpu_built) export PYTORCH_NO_CUDA_MEMORY_CACHING=1 && failed= && \
	for tool in memcheck racecheck synccheck initcheck; do \
		test $$tool = initcheck && ours= || ours="--kernel-regex kns=kdfast"; \
		compute-sanitizer --tool $$tool $$ours --error-exitcode 1 \
			$(gpu_pytest) -k every_branch $(CURDIR)/tests/csrc || failed="$$failed $$tool"; \
	done; \
	test -z "$$failed" || { echo "compute-sanitizer found errors:$$failed"; exit 1; }

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
# The CUDA library takes minutes to compile, and runs only where there is a driver; the tests compile
# its sources everywhere.
comma := ,
libraries := $(or $(KDFAST_BUILD),$(if $(shell command -v nvidia-smi),cpu$(comma)cuda,cpu))
project := KDFAST_BUILD=$(libraries) $(pip) --no-build-isolation --editable

sources := $(wildcard csrc/*.h csrc/*/*)

$(runtime): pyproject.toml setup.py constraints.txt requirements-demo.txt $(sources)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(pip) torch "setuptools>=77" wheel ninja
	$(pip) --no-deps --requirement requirements-demo.txt
	$(project) .
	touch $@

$(test): $(runtime)
	$(project) ".[test,gpu]"
	$(pip) repsim || echo "repsim needs a C++ compiler; the test that uses it is skipped"
	touch $@

$(lint): $(runtime)
	$(project) ".[lint]"
	touch $@
