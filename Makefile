# Two commands that set up all they need: make demo, make test. Only Python 3.11+ and make are assumed.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := runs/digits_vit-cyclic4-seed0

# Large pages for what is allocated: compiling and computing fault less. Known to glibc alone.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint docs clean

demo: .venv/installed
	.venv/bin/python train.py --workdir=$(RUN) --overwrite
	.venv/bin/python eval.py --workdir=$(RUN)

test: .venv/installed-test
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy equiadapt_jax

docs: .venv/installed-docs
	.venv/bin/mkdocs build --strict

clean:
	rm -rf .venv site

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-%: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@
