# Each target builds what it needs by itself; a second run starts at once.
# On a fresh machine only Python 3.11, bash, awk and make have to be there.

SHELL := /bin/bash
.DEFAULT_GOAL := help

export MODESEEK_HOME ?= $(HOME)/.modeseek
PYTHON_VENV := .venv/bin/python
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help setup setup-dev demo test test-page test-documents test-nodes fuzz check format serve playground bench faults load bench-forgetting bench-forgetting-small clean clean-all

help:  ## Explain the targets (this text)
	@echo "modeseek-ray: weighted fine-tuning of language models as a service on Ray"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Environment:"
	@echo "  MODESEEK_HOME   models, jobs and the database ($(MODESEEK_HOME))"
	@echo "  PYTHON          the Python 3.11 that .venv is made of"
	@echo "  PYTEST_ARGS     more for pytest:  make test PYTEST_ARGS='-k weights -x'"
	@echo "  BENCH_ARGS      more for bench:   make bench BENCH_ARGS='--only sync rollout'"

setup:  ## Build .venv from the pinned list (about 3 minutes and 4 GB, once)
	@deploy/setup.sh cpu

setup-dev:
	@deploy/setup.sh cpu dev

demo: setup  ## Three real jobs over HTTP on this machine: plain SFT, weighted, online; then a table and a report
	@.venv/bin/modeseek demo

# `check` has run tests/deploy by then.
test: check playground  ## Everything: environment, checks, small models (cached), every test
	@$(PYTHON_VENV) -m pytest --durations=15 $(if $(PYTEST_ARGS),$(PYTEST_ARGS),--ignore=tests/deploy)

test-page: setup-dev  ## The web page in a real browser; needs a Chromium (apt install chromium, or MODESEEK_CHROMIUM=)
	@MODESEEK_PAGE_TESTS=required $(PYTHON_VENV) -m pytest --durations=15 $(PYTEST_ARGS) tests/modeseek_ray/service/browser

test-documents: playground  ## Every command of the README's walk and the user's guide, training included, on a service with Ray
	@$(PYTHON_VENV) -m pytest --durations=5 $(PYTEST_ARGS) tests/e2e/documents_with_a_cluster.py

test-nodes: setup-dev  ## A cluster of three machines on this one; nodes killed and cut off. Needs root (network namespaces)
	@MODESEEK_NODE_TESTS=required $(PYTHON_VENV) -m pytest --durations=15 $(PYTEST_ARGS) tests/nodes

fuzz: setup-dev  ## Parsers (over 10^5 inputs), the store, and every route, at length (some 30 minutes)
	@MODESEEK_FUZZ=1 $(PYTHON_VENV) -m pytest --durations=15 $(PYTEST_ARGS) tests/modeseek_ray/test_fuzz.py \
	  tests/modeseek_ray/jobs/test_store_machine.py tests/modeseek_ray/service/test_openapi.py

check: setup-dev  ## Lint, formatting, types; every file of deploy/ by its offline checker
	@echo "check: ruff" && .venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@echo "check: mypy" && .venv/bin/mypy
	@echo "check: deploy/" && $(PYTHON_VENV) -m pytest -q tests/deploy

format: setup-dev  ## Put the code into shape: ruff's safe fixes, then its formatter
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

serve: setup  ## Start the service and Ray on this machine (127.0.0.1:8420); Ctrl-C ends both
	@.venv/bin/modeseek serve

playground: setup  ## Make the small MoE and dense models and their data (5 minutes each at most, cached)
	@$(PYTHON_VENV) -m modeseek_ray.playground moe
	@$(PYTHON_VENV) -m modeseek_ray.playground dense

bench: setup-dev playground  ## Every speed benchmark beside its peer, one table (about 20 minutes; goes on where it was)
	@$(PYTHON_VENV) -m tests.bench $(BENCH_ARGS)

faults: setup-dev playground  ## Break everything at every point: kills, stops, full disks; the table of all cells (goes on where it was)
	@mkdir -p build && $(PYTHON_VENV) -m tests.faults --out build/faults.md

load: setup-dev  ## The service under 464 clients on loopback for ten minutes: latencies, event lag, memory
	@$(PYTHON_VENV) -m tests.bench.load --seconds 600

bench-forgetting-small: setup-dev  ## Does weighting forget less? Five methods, one base: the direction (under 10 minutes)
	@$(PYTHON_VENV) -m tests.bench.forgetting small

bench-forgetting: setup-dev  ## The whole study of tests/bench/forgetting/PROTOCOL.md (about an hour idle; goes on), then its page
	@$(PYTHON_VENV) -m tests.bench.forgetting run
	@$(PYTHON_VENV) -m tests.bench.forgetting report --out build/forgetting

clean:  ## Remove caches and build outputs (keeps .venv and MODESEEK_HOME)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find modeseek_ray actors tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean  ## Remove .venv as well (keeps MODESEEK_HOME)
	@rm -rf .venv
