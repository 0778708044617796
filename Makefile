# Two commands for a newcomer: `make run` serves a disk from this checkout, `make test` proves it. `make help` lists the rest.
# Everything is installed into .venv, and again only when pyproject.toml changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

DATA ?= ./var
CLUSTER ?= ./var-cluster
LISTEN ?= 127.0.0.1:10809
HTTP ?= 127.0.0.1:9809
ROUNDS ?= 50
MINUTES ?= 1
SEED ?=
WORLD ?= all
OF ?= nodes
EXAMPLES ?= 20000
BENCH ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help run cluster test lint fuzz bench bench-cluster simulate soak soak-replicas power-loss power-loss-replicas man clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

run: $(VENV)/installed  ## serve disk0 (10 GiB, thin) on 127.0.0.1:10809 and ./var/nbd.sock until Ctrl-C
	@mkdir -p $(DATA)
	exec $(BIN)/nbdserver serve --data $(DATA) --create disk0=10G --socket $(DATA)/nbd.sock --listen $(LISTEN) --http $(HTTP)

cluster: $(VENV)/installed  ## start etcd (Debian's etcd-server) and three nodes on loopback until Ctrl-C, in ./var-cluster
	@exec $(BIN)/python -m tests.local_cluster $(CLUSTER)

test: $(VENV)/installed-for-tests  ## install what the tests need (as root), run all of them; REQUIRE_ALL=1: a skip is a failure
	@tests/provision.sh
	exec $(BIN)/python tests/run_levels.py

lint: $(VENV)/installed-for-tests  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/installed-for-tests  ## the property and mutation tests with EXAMPLES examples each
	@HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(EXAMPLES) exec $(BIN)/python -m pytest -n 2 -m fuzz tests

bench: $(VENV)/installed-for-tests  ## fio against this server and its peers in one run; results in bench-results/
	@tests/provision.sh
	exec $(BIN)/python -m tests.benchmark $(BENCH)

bench-cluster: $(VENV)/installed-for-tests  ## three replicas of ours beside three of Ceph's (Debian's, installed as root), in one run
	@tests/benchmark/cluster/provision.sh
	exec $(BIN)/python -m tests.benchmark.cluster $(BENCH)

simulate: $(VENV)/installed-for-tests  ## run fresh seeds for MINUTES on all cores, or one SEED again with its story; WORLD says of what
	@exec $(BIN)/python -m tests.simulation --world $(WORLD) $(if $(SEED),--seed $(SEED),--minutes $(MINUTES))

soak: $(VENV)/installed-for-tests  ## kill, stop and cut off the nodes of a real cluster for MINUTES, watching their memory; OF=directory: of their directories alone; OF=replicas: volumes on three nodes whose network is cut and whose disks hang and run full (as root), compared on disk in the end
	@tests/provision.sh
	exec $(BIN)/python -m tests.interop.soak --minutes $(MINUTES) --of $(OF) $(if $(SEED),--seed $(SEED))

soak-replicas: $(VENV)/installed-for-tests  ## kill, stop and replace data processes with replicas, and move these, for MINUTES under writes
	exec $(BIN)/python -m tests.interop.replication_soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

power-loss: $(VENV)/installed-for-tests  ## cut a virtual machine's power ROUNDS times under writes
	@tests/provision.sh
	POWER_LOSS_ROUNDS=$(ROUNDS) exec $(BIN)/python -m pytest -s tests/kernel/test_power_loss.py

power-loss-replicas: $(VENV)/installed-for-tests  ## cut the power of three virtual machines with replicas ROUNDS times under writes, of one and of all
	@tests/provision.sh
	POWER_LOSS_ROUNDS=$(ROUNDS) exec $(BIN)/python -m pytest -s tests/kernel/test_replicas_power_loss.py

man: $(VENV)/installed  ## write docs/nbdserver.1 from the program's own help
	@$(BIN)/python -m nbdserver.cli.manual docs

clean:  ## remove what was built; never touches ./var
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/kernel/.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# LevelDB's binding has no wheels beyond Python 3.12.
$(VENV)/bin/python:
	@python=
	for candidate in python3 python3.12 python3.11; do
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
	    python=$$candidate; break
	  fi
	done
	if [ -z "$$python" ]; then
	  echo "nbdserver needs Python 3.11 or 3.12 (LevelDB's binding has no wheels for others); here python3 is" \
	    "$$(python3 --version 2>&1 || true). Install python3.11 or python3.12 and run make again." >&2
	  exit 1
	fi
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then
	  if [ "$$(id -u)" != 0 ]; then
	    echo "Python's venv module is missing. Run: sudo apt-get install python3-venv" >&2
	    exit 1
	  fi
	  echo "installing python3-venv ..."
	  apt-get -qq update
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends python3-venv >/dev/null
	fi
	$$python -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing nbdserver into $(VENV) ..."
	$(PIP) install --editable .
	touch $@

$(VENV)/installed-for-tests: pyproject.toml | $(VENV)/bin/python
	@echo "installing nbdserver and its test tools into $(VENV) ..."
	$(PIP) install --editable '.[test]'
	touch $@ $(VENV)/installed
