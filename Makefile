# Needs Python >= 3.11 and make; everything else is installed into .venv, once.
# PYTHON=python3.12 chooses the interpreter that .venv is made with.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# Two processes run the tests. The one that has none left takes half of what the other has left.
AT_ONCE := -n 2 --dist worksteal

# The network's tests once more, on a CPU with a GPU's kernels. Left out is what is of other forms: the kernels' own tests,
# bands of label maps, what a CPU computes again, files of weights.
WITH_KERNELS := tests/m2f -m "not long and not full and not gpu" $(addprefix --ignore tests/m2f/,kernels weights \
  inference/test_semantic.py inference/test_recorded.py test_recompute.py)

# DVC wants to be told where there is no Git, as in an unpacked archive of the project.
WITHOUT_GIT := [ -e .git ] || dvc config --local core.no_scm true

# `dvc repro` calls `python`: that of .venv.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install demo test test-quick test-long test-full test-cluster lint audit clean
.DELETE_ON_ERROR:

help:
	@echo "make install       everything into $(VENV); the other targets do it too"
	@echo "make demo          train and evaluate shapes_tiny, two seeds at a time, and show the table"
	@echo "make test          the tests of less than a minute each, two at once"
	@echo "make test-quick    those of them that take a few seconds at most and do not start Ray"
	@echo "make test-long     those of about a minute each, two at once: kills, outages, a row of each task"
	@echo "make test-full     all: more kills, every row, a GPU's kernels interpreted; with a GPU or hosts, what needs them"
	@echo "make test-cluster  ray up, faults, ray down, Slurm, the image on hosts in namespaces; as root, with sshd, Slurm ..."
	@echo "make lint          ruff and mypy"
	@echo "make audit         known vulnerabilities of the pinned packages (docs/security.md)"
	@echo "make clean         remove caches; results/, storage/ and .venv stay"

demo: export M2F_WORKERS ?= 1
demo: $(INSTALLED)
	@$(WITHOUT_GIT)
	@dvc repro register@shapes_tiny
	@echo
	@python -m stages.report
	@echo
	@echo "What to do next, after . $(VENV)/bin/activate:"
	@echo "  the report     open reports/index.html: table, curves, images, and where each figure comes from"
	@echo "  every curve    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --backend-store-uri" \
	  "sqlite:///mlflow.db, then http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=panoptic-rows"
	@echo "  your images    docs/own-data.md: lay them out, name them in params.yaml, dvc repro register@<row>"

test: $(INSTALLED)
	@python -m pytest -q $(AT_ONCE) -m "not long and not full and not cluster and not gpu" --durations=20

test-quick: $(INSTALLED)
	@python -m pytest -q $(AT_ONCE) -m "not slow and not ray and not long and not full and not cluster and not gpu" \
	  --durations=10

test-long: $(INSTALLED)
	@python -m pytest -q $(AT_ONCE) -m long --durations=20

test-full: $(INSTALLED)
	@python -m pytest -q
	@python -m pytest -q -p tests.helpers.interpreted_kernels $(WITH_KERNELS)

test-cluster: $(INSTALLED)
	@python -m pytest -v -m cluster --durations=0

lint: $(INSTALLED)
	@ruff check
	@ruff format --check
	@mypy

# In an environment of its own. A package that cannot be looked up is an error; the one left out has no fixed version.
audit:
	@"$(PYTHON)" -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install -qq --disable-pip-version-check "pip-audit>=2.10"
	@$(VENV)/audit/bin/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip \
	  --ignore-vuln CVE-2025-69872

install: $(INSTALLED)
	@$(WITHOUT_GIT)

# Written last, so that an interrupted installation is repeated.
$(INSTALLED): requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: there is no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): 3 to 6 minutes and 7 GB, once"
	@"$(PYTHON)" -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
