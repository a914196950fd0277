# make demo       restore a short clip on this machine and write a comparison picture
# make test       everything that takes less than about ten seconds a test
# make test-all   the slow tests too
# make lint       style, types and the layer rules
# make picture    make the demonstration and cut the readme's picture out of it
# make docs       write docs/reference/cli.md from the commands
# make page-pictures  photograph the live page for docs/pictures, in Chromium, with the built-in model
#
# Every target makes its own virtual environment first and only once. To use another place, Python or build of torch:
#   make test VENV=/path/to/venv PYTHON=python3.12 PIP_ARGS="--extra-index-url <index with CPU builds>"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
OUT ?= out
STEPS ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
STAMPS := $(VENV)/.upriver

.PHONY: help venv demo picture page-pictures test test-all lint format docs clean

help:  ## say what there is
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# torch goes first and alone: pip then keeps the build that is there (a CPU build where the index or a local folder
# offers one), and nothing that depends on torch can pull another.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Upriver needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) --version). Use: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "Installing torch and what Upriver needs (one to three minutes) ..."
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(STAMPS)/app: pyproject.toml constraints.txt $(STAMPS)/torch
	@$(PIP) -e ".[openvino]"
	@touch $@

# torchvision lends RAFT to the tests. It is built for CUDA only: beside a torch without CUDA every library that finds it
# would stumble over its missing operators, so it goes into a folder of its own there, which only the tests look into.
# Without its dependencies, because they name one exact build of torch.
$(STAMPS)/dev: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "Installing Upriver with its test tools ..."
	@$(PIP) -e ".[dev]"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then place=; \
	  else place="--upgrade --target $(VENV)/torchvision-for-tests"; fi; \
	  $(PIP) --no-deps $$place "$$(grep '^torchvision==' constraints.txt)"
	@touch $@ $(STAMPS)/app

venv: $(STAMPS)/dev  ## the environment of `make test` and `make lint`

# One denoising step: on two CPU cores that is a minute instead of several. `make demo STEPS=4` takes the model's default.
demo: $(STAMPS)/app
	@mkdir -p $(OUT)/demo
	$(BIN)/upriver restore tests/data/walk_lr.mp4 $(OUT)/demo/restored.mp4 --steps $(STEPS) \
	  --compare --truth tests/data/walk_hr.mp4 --overwrite
	$(BIN)/upriver verify tests/data/walk_lr.mp4 $(OUT)/demo/restored.mp4
	@echo "Look at:"; ls -1 $(OUT)/demo/*

picture: demo
	$(BIN)/python docs/readme_strip.py $(OUT)/demo/restored.compare.png docs/models/readme_strip.png

page-pictures: $(STAMPS)/dev
	PICTURES=docs/pictures $(BIN)/python -m pytest -q tests/actors/test_page.py::test_pictures_for_the_documentation

test: $(STAMPS)/dev
	$(BIN)/python -m pytest -m "not slow" --durations=15 $(PYTEST_ARGS)

test-all: $(STAMPS)/dev
	$(BIN)/python -m pytest --durations=25 $(PYTEST_ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(STAMPS)/dev
	$(BIN)/python docs/reference/generate.py

clean:
	rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
