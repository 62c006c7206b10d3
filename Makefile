# make help lists the targets. PYTHON=python3.12 make ... takes another interpreter, from Python 3.10 on; JOBS=4 make test
# runs four processes of tests.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --quiet
PYTEST := $(BIN)/python -m pytest -q
JOBS ?= 2
IN_PARALLEL := -n $(JOBS) --dist loadfile
STYLED := hicl_fast kernels benchmarks examples tests tools setup.py
TYPED := hicl_fast kernels benchmarks examples tools setup.py

# Empty files that say when a step was last done: a step is done again when what it rests on is newer.
INSTALLED := .venv/.installed
LINKED := .venv/.linked
BUILT := .venv/.built

# What builds and checks the wheel lies apart from the environment that the tests run in.
WHEEL := .venv/wheel
WHEEL_TOOLS := $(WHEEL)/.installed
NVCC := $(WHEEL)/.nvcc

.DEFAULT_GOAL := help
.PHONY: help venv build bench test test-main test-cpus test-gpu-on-cpu test-interpret test-quick lint format docs wheel sdist test-wheel sanitize cuda-check gpu-first gpu-check clean

help: ## list the targets
	@echo "hicl_fast: contrastive losses as custom kernels. Each target does first whatever it needs."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make only the Python environment, .venv, with the pinned dependencies

build: $(BUILT) ## compile csrc/ in place and make `import hicl_fast` work in .venv

bench: $(BUILT) ## time the fused losses against everything comparable (ARGS="--help" for the options)
	$(BIN)/python benchmarks/loss_throughput.py $(ARGS)

test: test-main test-cpus test-gpu-on-cpu test-interpret ## run all the tests (ARGS goes to pytest)

test-main: $(BUILT) ## the tests but those in Triton's interpreter
	TRITON_INTERPRET=0 $(PYTEST) $(IN_PARALLEL) -m "not interpret" $(ARGS)

# What fails here fails for a reason that is no GPU's.
test-gpu-on-cpu: $(BUILT) ## tests/gpu on the CPU: the losses on the backend torch, the CUDA kernels emulated
	HICL_FAST_GPU_TESTS_DEVICE=cpu $(PYTEST) -n $(JOBS) --dist worksteal tests/gpu $(ARGS)

# test-main takes the widest set of row kernels that the processor has; here are the others.
NUMERICAL := tests/ops tests/integrations/test_sentence_transformers.py
OF_CPUS := (cpp or sentence_transformers and (ranking or types or small)) and not (torch or compile or export or blocks or any_shape)

test-cpus: $(BUILT) ## the numerical tests of the backend cpp with every narrower set of row kernels that this processor has
	@for set in $$($(BIN)/python -c "from hicl_fast.ops.backends import cpp; print(*cpp.row_kernel_sets()[:-1])"); do \
		echo "HICL_FAST_CPU=$$set TRITON_INTERPRET=0 $(PYTEST) $(IN_PARALLEL) -m 'not slow' -k '$(OF_CPUS)' $(NUMERICAL)"; \
		HICL_FAST_CPU=$$set TRITON_INTERPRET=0 $(PYTEST) $(IN_PARALLEL) -m "not slow" -k "$(OF_CPUS)" $(NUMERICAL) || exit 1; \
	done

# The interpreter replaces Triton's compiler for a whole process, so these tests have one of their own.
test-interpret: $(BUILT) ## the Triton kernels' tests, in Triton's interpreter on the CPU
	@if $(BIN)/python -c "import triton" 2>/dev/null; \
	then echo 'TRITON_INTERPRET=1 $(PYTEST) $(IN_PARALLEL) -m interpret $(ARGS)'; \
		TRITON_INTERPRET=1 $(PYTEST) $(IN_PARALLEL) -m interpret $(ARGS); \
	else echo "Triton is not installed: its kernels' tests are left out"; fi

test-quick: $(BUILT) ## the tests that take a few seconds at most
	TRITON_INTERPRET=0 $(PYTEST) $(IN_PARALLEL) -m "not interpret and not slow" $(ARGS)

lint: $(INSTALLED) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check $(STYLED)
	$(BIN)/ruff format --check $(STYLED)
	$(BIN)/mypy $(TYPED)

format: $(INSTALLED) ## rewrite the Python files in the style that lint asks for
	$(BIN)/ruff check --fix $(STYLED)
	$(BIN)/ruff format $(STYLED)

docs: $(LINKED) ## write the API reference, from the docstrings, to build/docs/index.html
	$(BIN)/python -c "import sphinx" 2>/dev/null || $(PIP) install -r requirements/docs.txt
	$(BIN)/python -m sphinx --quiet --fail-on-warning docs/api build/docs

# With the pinned nvcc, which is downloaded once; CUDA_HOME=... takes another one, HICL_FAST_CUDA=0 builds for CPUs only.
wheel: $(INSTALLED) $(WHEEL_TOOLS) $(if $(CUDA_HOME)$(filter 0,$(HICL_FAST_CUDA)),,$(NVCC)) ## build the wheel for an index, CPU and CUDA kernels inside, into dist/, and check it
	$(BIN)/python -m tools.build_wheel

sdist: $(INSTALLED) $(WHEEL_TOOLS) ## pack the sources into dist/, and check their metadata
	rm -f dist/*.tar.gz
	$(BIN)/python setup.py --quiet sdist
	$(WHEEL)/bin/python -m twine check --strict dist/*.tar.gz

test-wheel: wheel ## install the wheel into a clean environment and try it there
	HICL_FAST_WHEEL=1 $(PYTEST) -m wheel tests/packaging $(ARGS)

sanitize: $(LINKED) ## run csrc/cpu's tests under the address and undefined-behaviour sanitizers (ARGS=--quick: the short form)
	$(BIN)/python tools/sanitize.py $(ARGS)

cuda-check: $(INSTALLED) ## compile the CUDA kernels for every GPU, without one, and print registers, shared memory and spills
	$(BIN)/python tools/check_cuda.py $(ARGS)

gpu-first: ## on a machine with a GPU, what to run first: 150 s, into $OUT (build/gpu-first); ARGS=--rehearse without one
	$(PYTHON) -m tools.gpu_first $(ARGS)

gpu-check: ## on a machine with a GPU: tests, benchmark, sanitizer, into $OUT (build/gpu-check); uses PYTHON's own PyTorch
	$(PYTHON) -m tools.gpu_check $(ARGS)

clean: ## remove what was built, and keep .venv
	rm -rf build dist *.egg-info hicl_fast/*.so $(LINKED) $(BUILT)
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hicl_fast needs Python 3.10 or later; name one with PYTHON=..., as in: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(INSTALLED): requirements/dev.txt requirements/alone.txt requirements/triton.txt | $(BIN)/python
	@echo "Installing the pinned dependencies into .venv: a few minutes where PyTorch is still to be downloaded"
	$(PIP) install -r requirements/dev.txt
	$(PIP) install --no-deps -r requirements/alone.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --no-deps -r requirements/triton.txt
	@touch $@

$(WHEEL_TOOLS): requirements/wheel.txt | $(BIN)/python
	$(BIN)/python -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip --quiet --quiet install -r $<
	@touch $@

$(NVCC): requirements/cuda.txt $(WHEEL_TOOLS)
	@echo "Installing nvcc into $(WHEEL): 105 MB where it is still to be downloaded"
	$(WHEEL)/bin/python -m pip --quiet --quiet install --no-deps -r $< || { echo "make wheel: there is no nvcc: what \
	requirements/cuda.txt lists can't be installed here. CUDA_HOME=... names another one, HICL_FAST_CUDA=0 does without"; exit 1; }
	@touch $@

# The Python part: the source folders are what is imported.
$(LINKED): $(INSTALLED) setup.py pyproject.toml
	HICL_FAST_BUILD=skip $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# The C++ part, beside the Python one; not through pip, which would hide a warning.
$(BUILT): $(LINKED) setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
