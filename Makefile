# `make` lists the targets. Each one but `help` and `clean` first brings .venv up to date; with nothing changed that costs
# a few file stamps.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:                       # the last line printed is the test runner's

unexport PYTHONPATH PYTHONHOME

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON := $(BIN)/python
UV      = $(shell test -x $(BIN)/uv && echo $(BIN)/uv || echo uv)
DIST   := build/dist
# A second environment: the wheel and numpy, no torch.
BARE   := build/numpy-only
# Contestants of the bench beside torch: MIT, BSD.
PEERS     := llama-cpp-python==0.3.36 torchao==0.18.0
PEER_JOBS ?= 1
# Tests there that could not come out otherwise for want of torch.
SAME_EVERYWHERE := test_layering test_reference test_vectors

# Folders too: their time changes when a file is removed.
CORE_FILES   := Cargo.toml Cargo.lock rust/hbfp-python/Cargo.toml pyproject.toml build_backend.py \
                $(shell find rust -type d -o -name '*.rs')
OTHER_FILES  := README.md CHANGELOG.md LICENSE $(shell find python tests \( -name __pycache__ -o -name '*.so' \) -prune -o -print)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(VENV)/.core ## Make .venv: the compiled core (release), torch, and the tools that check it

.PHONY: demo
demo: setup ## Train in 4-bit fixed point beside FP32, live; report in build/demo
	$(BIN)/hbfp demo

.PHONY: test
test: test-rust test-numpy test-python ## Run every test: Rust, then numpy alone, then everything (HBFP_LEVEL=scalar forces a level)

.PHONY: lint
lint: setup ## Check format, lints and types: rustfmt, clippy, ruff, mypy --strict, stubtest
	cargo fmt --all --check
	PYO3_PYTHON=$(abspath $(PYTHON)) cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest hbfp._core --mypy-config-file pyproject.toml

.PHONY: fmt
fmt: setup ## Put Rust and Python sources in the house format
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: setup ## Time products and training steps against torch, torchao and ggml, with a verdict on each bar (ARGS="--record")
	$(BIN)/hbfp bench $(ARGS)

.PHONY: bench-quick
bench-quick: setup ## The same on few shapes, under 90 s; fails if HBFP4 is not twice as fast as FP32
	$(BIN)/hbfp bench --quick $(ARGS)

.PHONY: figures
figures: setup ## Print what the zoo of networks has at each width, how often it compiles, what watching costs (ARGS=--quick)
	$(BIN)/python tests/python/torch_figures.py $(ARGS)

# ggml is compiled here, for this CPU: minutes. --no-deps: the bench loads its libraries and runs none of its Python.
.PHONY: bench-peers
bench-peers: setup ## Add the optional contestants, ggml (needs a C++ compiler, takes minutes) and torchao, to .venv
	@for peer in $(PEERS); do \
	    CMAKE_BUILD_PARALLEL_LEVEL=$(PEER_JOBS) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" nice -n 19 \
	        $(UV) pip install --python $(PYTHON) --no-deps --no-binary llama-cpp-python "$$peer" || \
	        echo "make bench-peers: $$peer could not be installed, the reason stands above; hbfp bench runs without it" >&2; \
	done

.PHONY: vectors
vectors: setup ## Write tests/vectors anew from the exact-arithmetic oracle
	$(BIN)/hbfp vectors gen

.PHONY: docs
docs: setup ## Build the core crate's documentation, inner parts too, into target/doc
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --package hbfp --no-deps --document-private-items --locked

.PHONY: clean
clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build target python/hbfp/_core.*.so
	find python tests -name __pycache__ -prune -exec rm -rf {} +

# ---- tests, part by part; ARGS go to pytest

.PHONY: test-rust
test-rust: setup ## Only the Rust tests
	cargo test --package hbfp --all-features --locked

.PHONY: test-nightly
test-nightly: setup ## Products with everything drawn at random, 10,000 of them (HBFP_SEED=n HBFP_CASES=n)
	@echo "HBFP_SEED=$(HBFP_SEED) HBFP_CASES=$(HBFP_CASES)"
	cargo test --package hbfp --all-features --locked --test random_products

test-nightly: export HBFP_CASES ?= 10000
test-nightly: export HBFP_SEED ?= $(shell date +%Y%m%d00000)

.PHONY: memcheck
memcheck: setup ## Kernels of the levels that valgrind knows (scalar, avx2) under its memcheck
	CARGO_TARGET_$(HOST)_RUNNER="valgrind --tool=memcheck --quiet --error-exitcode=1 --leak-check=no --partial-loads-ok=no" \
	    cargo test --package hbfp --all-features --locked --test bounds --test convolutions --test keeping memcheck

memcheck: HOST = $(shell rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)

.PHONY: test-python
test-python: setup $(DIST)/.made ## Only pytest (ARGS="-k philox -x")
	$(BIN)/pytest $(ARGS)

.PHONY: test-numpy
test-numpy: $(BARE)/.made ## The numpy level from the built wheel, where there is no torch
	$(BARE)/bin/python -c "import importlib.util, sys, hbfp; \
	    assert not importlib.util.find_spec('torch'); assert hbfp.__file__.startswith(sys.prefix), hbfp.__file__"
	HYPOTHESIS_PROFILE=fast $(BARE)/bin/pytest -p no:cacheprovider $(SAME_EVERYWHERE:%=--ignore=tests/python/%.py) $(ARGS)

.PHONY: dist
dist: $(DIST)/.made ## Make the wheel and the sdist in build/dist

.PHONY: dist-check
dist-check: $(DIST)/.made ## Make a wheel from the sdist alone, as `pip install` would, and check it
	rm -rf build/from-sdist && mkdir -p build/from-sdist
	cp $(DIST)/*.tar.gz build/from-sdist
	$(UV) build --quiet --wheel --python $(PYTHON) --out-dir build/from-sdist build/from-sdist/*.tar.gz
	HBFP_DIST=build/from-sdist $(BIN)/pytest tests/python/test_packaging.py

# ---- what the targets above stand on

$(VENV)/.python:
	@base=""; \
	for each in $(BASE_PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	    base=$$($$each -c 'import sys; sys.version_info >= (3, 10) and print(sys.executable)' 2>/dev/null) || true; \
	    [ -z "$$base" ] || break; \
	done; \
	rust=$$(cargo --version 2>/dev/null | cut -d' ' -f2) || true; \
	need=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml); \
	missing() { echo "make setup: missing $$1. $$2" >&2; exit 1; }; \
	[ -n "$$base" ] || missing "Python 3.10 or newer" "Get it from https://www.python.org/downloads or your system's packages (Debian, Ubuntu: apt install python3 python3-venv); one that is not on PATH: make setup BASE_PYTHON=/path/to/python3."; \
	[ -n "$$rust" ] || missing "cargo, the Rust toolchain" "Get it from https://rustup.rs."; \
	printf '%s\n' "$$need" "$$rust" | sort -VC || missing "Rust $$need or newer (found $$rust)" "Run: rustup update stable. Or get rustup from https://rustup.rs."; \
	command -v cc >/dev/null || missing "cc, which Rust links with" "Install gcc or clang (Debian, Ubuntu: apt install gcc; macOS: xcode-select --install)."; \
	if uv --version >/dev/null 2>&1; then \
	    uv venv --quiet --allow-existing --python "$$base" $(VENV); \
	else \
	    "$$base" -m venv $(VENV) || missing "the venv module of $$base" "Debian, Ubuntu: apt install python3-venv."; \
	    $(PYTHON) -m pip install --quiet uv; \
	fi
	@touch $@

$(VENV)/.tools: pyproject.toml | $(VENV)/.python
	$(UV) pip install --python $(PYTHON) --requirements pyproject.toml --extra demo --group dev
	@touch $@

# Python sources are used in place: only a change of the core needs a build. uv would not see one, hence --reinstall.
$(VENV)/.core: $(CORE_FILES) $(VENV)/.tools $(if $(wildcard python/hbfp/_core.*.so),,core-missing)
	$(UV) pip install --python $(PYTHON) --no-build-isolation --no-deps --reinstall --editable .
	@touch $@

.PHONY: core-missing
core-missing:

$(DIST)/.made: $(OTHER_FILES) $(VENV)/.core
	rm -rf $(DIST)
	$(UV) build --quiet --wheel --no-build-isolation --python $(PYTHON) --out-dir $(DIST)
	$(UV) build --quiet --sdist --no-build-isolation --python $(PYTHON) --out-dir $(DIST)
	@touch $@

$(BARE)/.made: $(DIST)/.made
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(BARE)
	$(UV) pip install --python $(BARE)/bin/python --reinstall-package hbfp --group test $(DIST)/*.whl
	@touch $@
