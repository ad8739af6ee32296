# `make` alone lists what there is to do.
VENV ?= .venv
PYTHON ?= python3.12 python3.11 python3.13 python3.10 python3
WORKERS ?= 2

BIN := $(VENV)/bin
# What is installed, and from which checkout: a virtual environment may be shared by several.
STAMP := $(VENV)/.varitok
DIGEST = $$(cat pyproject.toml constraints.txt | cksum | tr -d '\n')
IN_RANGE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))

# Where it is set, each of the processes that tests start compiles all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow gpu check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: ## Make the virtual environment (VENV=.venv) and install varitok in it, for development
	@set -e; found=; digest="$(DIGEST)"; here="$$(pwd -P)"; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" = "$$digest $$here" ]; then exit 0; fi; \
	installed="$$(cut -d ' ' -f 1-2 $(STAMP) 2>/dev/null || true)"; rm -f $(STAMP); \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHON); do if $$python -c '$(IN_RANGE)' 2>/dev/null; then found=$$python; break; fi; done; \
		if [ -z "$$found" ]; then echo "error: no Python 3.10 to 3.13 found; give PYTHON=..." >&2; exit 2; fi; \
		echo "Making $(VENV) with $$found"; $$found -m venv $(VENV); \
	fi; \
	if [ "$$installed" = "$$digest" ]; then $(BIN)/python -m pip install -q --no-deps -e .; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi; \
	echo "$$digest $$here" > $(STAMP)

demo: setup ## Train a small tokenizer on made images, on a CPU, and show what it learnt
	@$(BIN)/python train.py experiment=image/demo

test: setup ## Run the tests that take seconds
	@WANDB_MODE=offline $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

slow: setup ## Run the tests that train or build
	@WANDB_MODE=offline $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --timeout 1800 -m slow

gpu: setup ## Run the tests that need a GPU, on one
	@WANDB_MODE=offline $(BIN)/python -m pytest -q -m gpu

check: setup ## Lint, check the format, the types and the words
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tests/words.py

clean: ## Remove caches and built packages; runs/ and downloads/ stay
	@rm -rf dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -not -path './.venv/*' -prune -exec rm -rf {} +
