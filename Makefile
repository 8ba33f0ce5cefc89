# make demo   set up .venv, then train and evaluate the tiny detector (runs/demo/index.html)
# make test   set up .venv, then lint, type-check and run every test
# make help   the other targets

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo demo-assets test test-gpu check docs site clean-demo

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

# make setup  create .venv with the locked versions (CUDA builds where a CUDA device is found)
setup:
	@$(PYTHON) tools/setup/install.py --venv $(VENV)

demo: setup
	$(BIN)/coordexp demo

# make demo-assets   only the tiny model and the scenes that configs/demo/*.yaml name
demo-assets: setup
	$(BIN)/coordexp demo --assets-only

# make check  ruff and mypy
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup check
	OMP_NUM_THREADS=1 COORDEXP_STRICT_METRICS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# make test-gpu   what needs a CUDA device, with what is installed; pytest's arguments: make test-gpu -- -k head --maxfail 1
# (an environment is only set up where there is none; BIN=/usr/bin takes the Python found there)
test-gpu: | $(BIN)/python
	$(BIN)/python -m pytest -m gpu $(or $(filter tests/gpu/%,$(GPU_ARGS)),tests/gpu) $(filter-out tests/gpu/%,$(GPU_ARGS))

$(BIN)/python:
	@$(MAKE) --no-print-directory setup

# To make, everything after `--` is a goal: those that follow test-gpu are its arguments and nothing to be made.
ifeq (test-gpu,$(firstword $(MAKECMDGOALS)))
GPU_ARGS := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
.PHONY: $(GPU_ARGS)
$(GPU_ARGS):
	@:
endif

# make docs   regenerate runbooks/config.md, runbooks/metrics.md and runbooks/rules.md
docs: setup
	$(BIN)/coordexp config write-reference
	$(BIN)/coordexp metrics write-reference
	$(BIN)/coordexp metrics write-rules

# make site   build the documentation site (build/site/index.html)
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file tools/docs/mkdocs.yml

clean-demo:
	rm -rf runs/demo
