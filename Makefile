# Each target does everything it needs from a clean clone: Python 3.11 to 3.13, make and a package registry are enough.

CONFIG ?= configs/digits_vit.py
CONFIGS ?= $(wildcard configs/*.py)
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
# Passed on: make train ARGS="--config.total_steps=100", make test ARGS="-k vit"
ARGS ?=
# Two test processes: each holds JAX and TensorFlow (about 1 GB), and XLA uses further cores by itself.
WORKERS ?= 2

bin := .venv/bin
pytest := $(bin)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 --durations-min 1

.PHONY: help train test test-all plan lint format lock audit clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  Variables: ARGS (for bigjax or pytest), CONFIG, WORKDIR, WORKERS, PYTHON (an interpreter, the first time)'

train:  ## train the main example on real data (or CONFIG=configs/NAME.py)
	@sh scripts/bootstrap.sh examples
	@$(bin)/bigjax train --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test:  ## the test suite
	@sh scripts/bootstrap.sh examples dev
	@$(pytest) -m "not slow" $(ARGS)

test-all:  ## the test suite with the slow tests, programs compiled as for users
	@sh scripts/bootstrap.sh examples dev
	@XLA_FLAGS="$$XLA_FLAGS" $(pytest) $(ARGS)

plan:  ## hold configs to the budgets they state, on TPUs that need not be there (CONFIGS="configs/NAME.py ...")
	@sh scripts/bootstrap.sh examples plan
	@$(bin)/bigjax plan --check $(CONFIGS)

lint:  ## ruff's checks, and its format
	@sh scripts/bootstrap.sh examples dev
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

format:  ## mend what ruff can mend
	@sh scripts/bootstrap.sh examples dev
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

lock:  ## resolve pyproject.toml into constraints.txt again (ARGS=--upgrade: the newest versions)
	@sh scripts/bootstrap.sh examples dev
	@sh scripts/lock.sh $(ARGS)

audit:  ## hold the pinned packages against known vulnerabilities (needs the network: PyPI's, or ARGS="-s osv")
	@sh scripts/bootstrap.sh examples dev
	@$(bin)/uv tool run pip-audit --strict --disable-pip --no-deps -r constraints.txt $(ARGS)

clean:  ## remove what make made (.venv, caches, builds), never runs/
	@rm -rf .venv .cache .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
