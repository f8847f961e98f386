# make quickstart   train a small TaylorViT on real digits and evaluate it; a second call continues or evaluates that run
# make test         run the tests, on at most 8 cores at once
# make test-gpu     run the tests that need a GPU, and those of the kernels on it, slow ones too
# make check        check formatting, lint and types
# make format       apply formatting and lint fixes
# make clean        remove the environment and the caches; runs and data stay
#
# All but the last work in .venv, made and filled on first use. PYTHON=python3.12 chooses the interpreter that it is made with,
# RUN_DIR the quick start's run folder.

PYTHON ?= python3
RUN_DIR ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Stamps: an installation is repeated only when its list of requirements changes.
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-gpu check format clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

quickstart: $(RUNTIME)
	$(BIN)/python train.py --config configs/quickstart.yaml --run_dir $(RUN_DIR) --resume auto
	@echo
	@echo "run folder   $(RUN_DIR)"
	@echo "TensorBoard  $(BIN)/tensorboard --logdir $(RUN_DIR)/tensorboard"
	@$(BIN)/python eval.py $(RUN_DIR) --worst 0

test: $(DEV)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m "" tests/test_gpu*.py tests/test_operators.py

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt | $(BIN)/python
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
