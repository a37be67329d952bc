# `make` alone lists what there is. Everything runs in its own virtual environment, made on first use.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := src tests examples benchmarks docs
# The first of these that is Python >= 3.11 and can make environments; choose another with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$p; break; fi; done)
# On Linux the usual index has torch with CUDA. For the far smaller CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
APP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo app docs test lowest compatibility suites style quality bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make the environment (every other target does so by itself)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv and ensurepip was found." \
		"Install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Make a donor on the built-in task, graft its skill, reload it; offline, results in demo_out/
	HF_HUB_OFFLINE=1 $(BIN)/python examples/graft.py --output-dir demo_out $(DEMO_ARGS)

app: $(VENV)/.app ## Explore the demo's donor in a browser (APP_ARGS="--base B --donor D --train T --validation V" for yours)
	$(BIN)/python examples/app.py $(APP_ARGS)

docs: $(VENV)/.docs ## Build the site, to be read at site/index.html; broken links and references fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.app $(VENV)/.docs: $(VENV)/.%: $(STAMP)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

test: $(STAMP) ## Run the tests (PYTEST_ARGS="-n 2" for two at a time, "-m slow" for the slow ones)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lowest: ## Run the tests with the lowest supported versions of the Hugging Face packages, in an environment of their own
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

compatibility: $(STAMP) ## Run the tests that show a feature of PEFT, and write docs/peft_compatibility.md from them
	$(BIN)/python -m pytest -m feature --compatibility=docs/peft_compatibility.md $(PYTEST_ARGS)

suites: $(STAMP) ## Put grafts through PEFT's own test suites (fetches its source; about 15 minutes)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) diffusers parameterized scipy
	$(BIN)/python tests/peft_suites/run.py $(PYTEST_ARGS)

style: $(STAMP) ## Put the code into house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(STAMP) ## Check style and types, change nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(STAMP) ## Run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do \
		if [ -f "$$script" ]; then echo "== $$script"; $(BIN)/python "$$script"; fi; done

clean: ## Remove the environment, the demo's results and all caches
	rm -rf $(VENV) .venv-lowest demo_out site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
