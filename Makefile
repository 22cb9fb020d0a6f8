# `make test` is all there is to know; it works from a fresh clone with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DELTA_JARS ?= $(CURDIR)/.cache/jars

# Each of some 300 processes would compile our modules anew, and each of pytest's workers all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: bench help setup jars jars-servers jars-debezium programs test test-containers test-elsewhere test-long checked lint types mypy pyright unit format clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## the virtual environment, with exactly the packages of requirements/dev.txt

# Again when the packages or our entry points may have changed; otherwise it costs nothing.
$(READY): requirements/dev.txt pyproject.toml tests/servers/install.sh
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12")'
	tests/servers/install.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

jars: jars-servers jars-debezium ## the servers that come from neither Python packages nor this machine (once, some 900 MB)

jars-servers: programs
	$(BIN)/python -m delta_debezium.engine_recording
	$(BIN)/python -m delta_sync.testing.prepare

jars-debezium: programs
	$(BIN)/python -m delta_debezium.distribution

programs: $(READY)
	tests/servers/install.sh $(PYTHON) servers

# Tests wait for servers and disks half of the time, so three at once suit two cores. Which stay together is in
# tests/conftest.py; they come in their order, the slow acceptance tests first.
TOGETHER := --numprocesses 3 --no-loadscope-reorder --maxfail 25
SERVERLESS := tests/unit tests/simulation

test: setup ## everything that must be clean before a commit
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=target checked
	$(BIN)/pytest $(TOGETHER) -m "not long" $(addprefix --ignore=,$(SERVERLESS))

test-long: setup jars ## the scenes that take longest, beside those of make test: before a release, and after a change of what they are about
	$(BIN)/pytest $(TOGETHER) -m long

checked: jars lint types unit # side by side: fetching waits for the network, and takes as long as all the others

unit: setup ## the tests that need no server
	$(BIN)/pytest --numprocesses 2 --maxfail 25 $(SERVERLESS)

# A test's time includes that of building its images. Ryuk, which removes what a killed test run leaves, is one more
# image that may not be had.
test-containers: setup jars ## images, compose/dev and the servers as containers; brings a Docker engine where none answers
	PYTHON=$(CURDIR)/$(BIN)/python tests/containers/engine.sh sh -euc 'tests/containers/images.sh; \
		$(BIN)/pytest --timeout 1800 tests/containers; \
		export DELTA_TEST_SERVICES=containers TESTCONTAINERS_RYUK_DISABLED=true; \
		$(BIN)/pytest -k "not kafka_cluster and not redis_cluster" \
			tests/integration/test_servers.py tests/integration/test_kafka_topics.py tests/contract/test_redis_store.py'

test-elsewhere: setup jars ## what takes servers and packages that `make test` has not: MySQL, stores of objects
	tests/servers/mysql.sh
	tests/servers/objects.sh $(CURDIR)/.cache/elsewhere
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --upgrade \
		--target .cache/elsewhere/python -r requirements/elsewhere.txt
	PYTHONPATH=$(CURDIR)/.cache/elsewhere/python $(BIN)/pytest tests/elsewhere

lint: setup ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: mypy pyright ## mypy and pyright, both strict

mypy: setup
	$(BIN)/mypy

pyright: setup
	$(BIN)/pyright

format: setup ## rewrite the code as ruff has it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# ── demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────

.PHONY: demo playground

demo: setup ## a pipeline from nothing to a proof, with real servers, in half a minute
	@$(BIN)/python -m examples.demo

playground: setup ## the demo's servers, and a shell to type at them: docs/tutorial.md
	@$(BIN)/python -m examples.demo.playground

# ── bench ────────────────────────────────────────────────────────────────────────────────────────────────────────

bench: setup ## measure: the worker alone, end to end beside the engine alone, latency, footprint, Kafka, dumps (45 min)
	$(BIN)/python benchmarks/worker.py
	$(BIN)/python benchmarks/lookups.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/kafka_worker.py --processes 1 2 4
	$(BIN)/python benchmarks/latency.py --transport kafka
	$(BIN)/python benchmarks/takeover.py
	$(BIN)/python benchmarks/dump_beside_debezium.py
	$(BIN)/python benchmarks/latency.py --dump-rows 500000
	$(BIN)/python benchmarks/latency.py --transport kafka --dump-rows 500000

# ── docs ─────────────────────────────────────────────────────────────────────────────────────────────────────────

.PHONY: docs

docs: setup ## write the pages that are generated
	$(BIN)/python -m deltactl.reference > docs/reference/cli.md
	$(BIN)/python -m delta_debezium.reference > docs/reference/connector.md

# ── end of them ──────────────────────────────────────────────────────────────────────────────────────────────────

clean: ## all that these targets made
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
