# Every target sets itself up from a clean checkout: it needs make, python3 (3.10 or newer, with venv) and, for the fast
# backend, a C++20 compiler.
#
#   make demo       upscale assets/sample.png, write demo/, and tell the PSNR beside bicubic interpolation
#   make test       run the tests
#   make test-fast  those that take no minutes: see below what it leaves out
#   make soak       the long campaigns that `make test` only samples: hours on two cores
#   make test-gpu-sanitize  the tests of the CUDA kernels under compute-sanitizer, on a machine with a GPU
#   make lint       ruff, mypy, import-linter and clang-format; changes nothing        make format   apply ruff and clang-format
#   make build      the environment in .venv with the package installed, its extension compiled
#   make benchmark  the benchmarks and benchmarks/results/<device>/report.md and report.html, in less than half an hour
#   make benchmark-compare BASE=<commit>  is the working tree, or HEAD=<commit>, slower than BASE? Fails if it is
#   make docs       the documentation in build/docs
#   make wheel      a wheel in dist/                                    make clean    remove all of the above
#   make wheels     audited wheels in dist/: for CPUs, and for each major version of CUDA (CUDA="/usr/local/cuda-13 ..."; CUDA= for none)
#
# Variables: PYTHON, the Python that makes the environment; TORCH, what pip installs where torch is missing; WORKERS, the
# processes that run the tests. A machine with a GPU may want:  make build TORCH="torch --index-url <the index of its CUDA version>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_TESTS := $(shell find tests -name '*.cpp' -o -name '*.h')
# What the extension and the installed metadata are made of; an edit of other Python files needs no new install.
SOURCES := pyproject.toml setup.py $(wildcard building/*.py) fastroute/__init__.py $(wildcard fastroute/ops/*.py) $(CPP)

.DELETE_ON_ERROR:
.PHONY: docs demo test test-fast soak test-gpu-sanitize lint lint-ruff lint-format lint-types lint-layers lint-cpp format build benchmark benchmark-compare wheel wheels clean

demo: $(VENV)/built
	mkdir -p demo
	$(RUN) -m fastroute upscale assets/sample.png demo/sample-x4.png --budget 0.7 --class-map demo/sample-classes.png
	@echo "The sample reduced four times and super-resolved again, beside bicubic interpolation:"
	$(RUN) -m fastroute evaluate classsr-fsrcnn-x4 --images assets --exclude demo.png --budget 0.7 --quiet

# Processes of one thread each take file after file, those that take minutes first.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests -p no:benchmark -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/installed
	$(TEST)

# For the time between two edits: all tests but those marked `slow`, which take a third of a second or more.
LEFT_OUT := whatever takes a third of a second or more, thus all of compilers and what they compile (Triton and its interpreter, nvcc \
	and the emulated GPU, sanitizers, Inductor, graphs of whole routers, OpenVINO, narrower instruction sets), browsers and the \
	site, mypy, Ray clusters, training, examples, smoke runs of benchmarks, and processes that are killed or whose memory is measured
test-fast: $(VENV)/installed
	$(TEST) -m "not soak and not slow"
	@echo "Left out, for make test to run: $(LEFT_OUT)."

# All of them, or those whose names match: make soak ONLY=orders
soak: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests -p no:benchmark -m soak --durations=20 $(if $(ONLY),-k "$(ONLY)")

# Compilation and repetition launch the same kernels again. racecheck looks at shared memory, initcheck at global memory
# that was never written: torch must not keep freed memory for later. The kernels of other libraries, and calls that torch
# tries and recovers from, are not looked at.
SANITIZE := compute-sanitizer --error-exitcode 1 --target-processes all --kernel-name kns=fastroute --report-api-errors no
test-gpu-sanitize: $(VENV)/installed
	for tool in memcheck racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool $$tool \
			$(RUN) -m pytest -q tests/ops -k "cuda-cuda and not compiles and not deterministic" || exit 1; \
	done

# What fails to run is named at the end; the report is written from the results that there are. A machine that is too slow
# for the time leaves the last benchmarks out and says so.
benchmark: $(VENV)/benchmark
	status=0; $(RUN) -m pytest benchmarks/ops benchmarks/e2e -v -s -rs --save --minutes 27 --durations=30 || status=$$?; $(RUN) -m benchmarks.device_report && exit $$status

# Both are built under build/compare and run in turn; see the head of benchmarks/compare.py.
benchmark-compare: $(VENV)/installed
	@test -n "$(BASE)" || { echo "make benchmark-compare BASE=<commit, branch or tag> [HEAD=<another>]"; exit 2; }
	$(RUN) -m benchmarks.compare "$(BASE)" $(if $(HEAD),--head "$(HEAD)")

build: $(VENV)/installed

docs: $(VENV)/installed
	$(RUN) -m sphinx -W -q -b html docs build/docs

# `make -k lint` reports the findings of all tools, not only the first that has any.
lint: lint-ruff lint-format lint-types lint-layers lint-cpp

lint-ruff: $(VENV)/dev
	$(RUN) -m ruff check --output-format concise .

lint-format: $(VENV)/dev
	$(RUN) -m ruff format --check .

lint-types: $(VENV)/dev
	$(RUN) -m mypy fastroute

# The layers of the package, see ARCHITECTURE.md.
lint-layers: $(VENV)/dev
	$(VENV)/bin/lint-imports --no-logo

lint-cpp: $(VENV)/dev
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(CPP_TESTS)

format: $(VENV)/dev
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(CPP_TESTS)

wheel: $(VENV)/torch
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheels: $(VENV)/built
	$(PIP) install --quiet "fastroute[wheels]"
	$(RUN) building/wheels.py $(if $(filter undefined,$(origin CUDA)),,--cuda $(CUDA))

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastroute/_C*.so fastroute/_ops.so fastroute/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below record what has been done to the environment.

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build requirements of pyproject.toml: without isolation pip leaves them to us.
$(VENV)/torch: pyproject.toml | $(VENV)/bin/python
	@$(RUN) -c "import torch" 2>/dev/null || { echo "Installing $(TORCH): a large download."; $(PIP) install --quiet $(TORCH); }
	$(PIP) install --quiet "setuptools>=77" ninja pybind11
	touch $@

# The demo needs no more than this.
$(VENV)/built: $(VENV)/torch $(SOURCES)
	@echo "Compiling fastroute: a few minutes on two cores, a quarter of an hour on one busy one. MAX_JOBS limits the compilers."
	$(PIP) install --quiet --no-build-isolation --editable ".[evaluate]"
	@$(RUN) -c "import fastroute; from fastroute.backends import EXTENSION as e; \
		print('fastroute:', *e.reasons or ['the compiled operators are in place']); \
		e.reasons and print('The reference backend will be used. For the fast one install g++, then: touch setup.py && make build')"
	touch $@

$(VENV)/installed: $(VENV)/built
	@echo "Installing what the tests need."
	$(PIP) install --quiet "fastroute[test]"
	touch $@

$(VENV)/benchmark: pyproject.toml | $(VENV)/installed
	$(PIP) install --quiet "fastroute[benchmark]"
	touch $@

# The tools that pyproject.toml pins; mypy also reads the types of what is installed.
$(VENV)/dev: pyproject.toml | $(VENV)/installed
	$(PIP) install --quiet "fastroute[dev]"
	touch $@
