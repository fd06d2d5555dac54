# All targets use .venv, which is created on first use:  make demo
# Other interpreter:  make PYTHON=python3.12 test      Options for pytest:  make test ARGS='-k space'

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs horovod clean

PYTHON ?=
ARGS ?=
PY := .venv/bin/python
INSTALLED := .venv/.installed
INSTALLING := .venv/.installing

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train, evaluate and plot a compound supernet on handwritten digits (minutes)
	$(PY) -m nas.cli.demo --output runs/demo $(ARGS)

test: $(INSTALLED)  ## run the tests
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(INSTALLED)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)  ## format the sources and fix style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED)  ## measure the speed of training steps and searches
	$(PY) -m benchmarks $(ARGS)

docs: $(INSTALLED)  ## write the API reference to build/docs
	$(PY) tools/api_reference.py build/docs

horovod: $(INSTALLED)  ## build Horovod and install it into .venv (minutes; needs g++ and cmake)
	tools/install_horovod $(PY)

clean:  ## remove the environment, builds and caches, but not runs/
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is complete once the last step has created the stamp. An interrupted attempt leaves
# .installing behind, and the next one then starts over, as it does if pip in .venv does not work. Any
# other existing .venv is kept and installed into.
$(INSTALLED): setup.py constraints.txt
	@set -e; trap 'exit 130' INT TERM; \
	if [ -e $(INSTALLING) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    python=; seen=; \
	    for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	        version=$$("$$candidate" -c 'import platform; print(platform.python_version())' \
	            2>/dev/null) || version="does not run"; \
	        seen="$$seen, $$candidate ($$version)"; \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	        then python=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "compofa needs Python 3.10 or newer; found$${seen#,}" >&2; \
	        echo "Choose another one:  make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	        exit 1; \
	    fi; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$python cannot create environments: the modules venv and ensurepip are missing." >&2; \
	        echo "Install them (Debian, Ubuntu: apt install python3-venv) and run make again." >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating .venv with $$("$$python" --version)"; \
	    rm -rf .venv; mkdir .venv; touch $(INSTALLING); \
	    "$$python" -m venv .venv; \
	fi; \
	touch $(INSTALLING); \
	echo "Installing compofa and its dependencies into .venv (minutes the first time)"; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' \
	    || { rm -f $(INSTALLING); exit 1; }; \
	mv $(INSTALLING) $(INSTALLED); touch $(INSTALLED); \
	echo "Installed."
