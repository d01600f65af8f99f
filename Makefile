# Copyright: the virt.iommufd contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# A Python that runs the tools; 'make PYTHON=python3.13' takes another. The first that really starts, as a shim may not.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# What is never imported is never compiled.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
# Where Ansible finds the collection, whatever the name of this folder.
TREE := $(CURDIR)/$(VENV)/tree
RESULTS := .nox/results
# How many test sessions run at once. A third makes each slower by as much as it does, on two processors.
PARALLEL ?= 2
LAB := $(BIN)/python tests/lab
# What ends the guest of 'demo' and 'bench', to be copied from there.
STOP := $(if $(LAB_INSTANCE),LAB_INSTANCE=$(LAB_INSTANCE) )$(VENV)/bin/python tests/lab down fallback
export ANSIBLE_COLLECTIONS_PATH := $(TREE)
# With it the formatter only checks; 'make format' rewrites.
NOX := CI=true PATH="$(BIN):$$PATH" $(BIN)/nox

.PHONY: help demo test check bench format clean lab-tools

help:  ## show this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: lab-tools  ## show the failure and the cure on a real kernel, in a disposable VM
	@# The guest comes up while Ansible is installed.
	$(LAB) up fallback & $(MAKE) --silent $(VENV)/ansible && wait $$! || { wait; exit 1; }
	$(LAB) inventory fallback > $(VENV)/inventory
	ANSIBLE_PIPELINING=true ANSIBLE_CALLBACK_RESULT_FORMAT=yaml \
	    $(BIN)/ansible-playbook -i $(VENV)/inventory tests/demo/demo.yml
	@echo "The VM is still up. To stop it: $(STOP)"

check: $(VENV)/stamp  ## check quickly: lint, and the unit tests on one Python
	@rm -rf $(RESULTS)
	@# The scenarios, which are most of what ansible-lint reads, are linted by 'make test'. It runs beside the others.
	@$(NOX) -s ansible-lint -- roles playbooks meta galaxy.yml & lint=$$!; status=0; \
	    QUICK=1 $(NOX) --parallel $(PARALLEL) --stop-on-first-error -s \
	    "units-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" types lint license-check || status=$$?; \
	    wait $$lint && exit $$status

# Everything runs, whatever fails before it; the report at the end decides. No guest outlives a run that is interrupted.
test: $(VENV)/stamp lab-tools  ## run all tests, as CI does, and report what ran and what could not
	@rm -rf $(RESULTS)
	@mkdir -p $(RESULTS)
	@$(NOX) --list --json > $(RESULTS)/planned.json
	@export QUICK= LAB_INSTANCE="$${LAB_INSTANCE:-}-test"; trap 'exit 130' INT; trap '$(LAB) down --all' EXIT; status=0; \
	    $(NOX) --parallel $(PARALLEL) --report $(RESULTS)/ran.json || status=$$?; \
	    $(BIN)/python tests/tooling/report.py $(RESULTS) $$status

bench: $(VENV)/stamp lab-tools  ## measure what the modules cost, in a disposable VM (half an hour)
	$(LAB) up fallback
	$(BIN)/python tests/bench
	@echo "The VM is still up. To stop it: $(STOP)"

format: $(VENV)/stamp  ## lay out the Python files as 'make check' wants them
	CI= PATH="$(BIN):$$PATH" $(BIN)/nox -s formatters

clean:  ## remove everything that was made here (not the lab's cache: 'python3 tests/lab clean')
	rm -rf $(VENV) .nox .ansible .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache tests/output
	find . -name __pycache__ -prune -exec rm -rf {} +

lab-tools: $(VENV)/made
	@$(LAB) tools --install

$(VENV)/stamp: $(VENV)/ansible
	@$(INSTALL) -r tests/requirements/dev.txt
	@touch $@

# All that the demo needs: it does not wait for the tools that run the tests.
$(VENV)/ansible: $(VENV)/made
	@$(INSTALL) -c tests/requirements/constraints.txt -r tests/requirements/ansible-core.txt
	@touch $@

$(VENV)/made: $(wildcard tests/requirements/*.txt) Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: apt-get install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    package="python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
	    if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; \
	    else echo "Python's venv module is missing: sudo apt-get install $$package" >&2; exit 1; fi; \
	    $$sudo apt-get update -q && $$sudo apt-get install -q -y --no-install-recommends "$$package"; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(TREE)/ansible_collections/virt
	@ln -s $(CURDIR) $(TREE)/ansible_collections/virt/iommufd
	@touch $@
