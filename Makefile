# One command per intent. Everything runs as root on one Linux machine; see README.md.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PYTHONPATH := api/src:operator/src:node-agent/src:testbed/src
export PYTHONPATH

# Several parts at once: they wait more than they work. Each prints what it has to say when it
# has ended.
TOGETHER = $(MAKE) --jobs=4 --output-sync=target --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help venv check unit contract host e2e e2e-routed e2e-bridged support test demo demo-down cluster bench bench-quick bench-report chaos chaos-report soak soak-quick soak-report model clean

help:  ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.synced: requirements-dev.lock
	scripts/bootstrap
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	touch $@

venv: $(VENV)/.synced  ## Create the virtual environment from the lock file

check: venv  ## Static checks: ruff, mypy, import layers, go vet, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy api/src operator/src node-agent/src testbed/src lab bench chaos
	$(BIN)/lint-imports --config pyproject.toml
	scripts/check-generated
	cd hooks && go vet ./...

unit: venv  ## Fast tests: pure code, contracts, the Go binary
	cd hooks && go test ./...
	$(BIN)/pytest -q tests/unit tests/contract/agent tests/contract/chart

# In a network namespace, so it has a process of its own: gRPC opens sockets from threads that
# other tests may have started outside.
contract: venv  ## The operator against a real API server
	$(BIN)/pytest -q tests/contract/operator

host: venv  ## Tests with real CRIU, namespaces and network, as root
	$(BIN)/pytest -q tests/host

e2e:  ## Tests on two real clusters at once (brings the testbeds up and installs Godwit)
	$(TOGETHER) e2e-routed e2e-bridged

e2e-routed: venv
	$(BIN)/pytest -q -m "not support and not bridged" tests/e2e

e2e-bridged: venv
	$(BIN)/pytest -q -m "not support and bridged" tests/e2e

test: venv  ## Everything
	testbed/testbed build
	$(TOGETHER) check unit contract host
	$(TOGETHER) e2e-routed e2e-bridged

support: venv  ## Tests of real software; writes docs/support.md from what they saw
	rm -f tests/e2e/results/support.jsonl
	mkdir -p tests/e2e/results
	GODWIT_SUPPORT_RESULTS=$(CURDIR)/tests/e2e/results/support.jsonl $(BIN)/pytest -q -m support tests/e2e
	$(BIN)/python -m lab.beside $(CURDIR)/tests/e2e/results/support.jsonl
	$(BIN)/python -m lab.support

demo: venv  ## Watch a live pod move there and back
	$(BIN)/python -m lab.demo

cluster: venv  ## A standing testbed with this checkout's Godwit on it (GODWIT_TESTBED names it)
	$(BIN)/python -m lab.cluster

bench: venv  ## Every cell of docs/performance.md, about an hour; raw data in bench/results
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.report

bench-quick: venv  ## A few minutes of the same
	$(BIN)/python -m bench.run --quick

bench-report: venv  ## Tables and plots of docs/performance.md from the raw data
	$(BIN)/python -m bench.report

chaos: venv  ## Every step of a migration with every fault, hours; raw data in chaos/results
	$(BIN)/python -m chaos.run
	$(BIN)/python -m chaos.report

chaos-report: venv  ## The table of docs/reliability.md from the raw data
	$(BIN)/python -m chaos.report

soak: venv  ## A pod moves back and forth for two hours and every minute something breaks
	$(BIN)/python -m chaos.soak
	$(BIN)/python -m chaos.soakreport

soak-quick: venv  ## Ten minutes of the same
	$(BIN)/python -m chaos.soak --minutes 10 --out build/soak.jsonl

soak-report: venv  ## The soak's part of docs/reliability.md from the raw data
	$(BIN)/python -m chaos.soakreport

model:  ## Every interleaving of the commit's model (needs spin)
	scripts/check-model

demo-down:  ## Remove what the demo made
	testbed/testbed down

clean:  ## Remove build results and the virtual environment (not the testbed's cache)
	rm -rf build dist $(VENV)
