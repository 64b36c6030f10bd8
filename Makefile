# Everything a person or a machine does with Encore from a fresh clone. `make` alone lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup check test demo app lock clean browser

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.encore-installed
HOST ?= 127.0.0.1
PORT ?= 7860
RATER ?= me
JOBS ?= 2
DB ?= sqlite:///runs/demo/encore.db

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: $(STAMP) ## make .venv and install what requirements.lock pins (instant when it is there)

$(STAMP): requirements.lock pyproject.toml
	@bash .ci/make_venv "$(VENV)"
	$(BIN)/python -m pip install --no-deps -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@# PyPI's torch for Linux is a CUDA build that cannot start without its libraries; torch itself names their exact versions.
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	@touch $@

check: setup ## lint, format, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

browser: setup ## make sure that the page's tests have a Chromium
	@bash tests/ensure_browser "$(BIN)"

test: setup browser check ## everything that must hold: checks and the whole suite (JOBS=2 side by side)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

demo: setup ## the whole loop on this machine: votes, reward model, DPO, PPO, report
	$(BIN)/encore demo

app: setup ## rate by hand at http://127.0.0.1:7860 (RATER=name, PORT=..., DB=...)
	@mkdir -p runs/demo
	$(BIN)/python -m feedback_app.app --db "$(DB)" --host "$(HOST)" --port "$(PORT)" --rater "$(RATER)"

lock: setup ## resolve pyproject.toml anew into requirements.lock
	$(BIN)/python .ci/lock.py

clean: ## remove the environment and caches; runs/ (votes, models) stays
	rm -rf "$(VENV)" build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
