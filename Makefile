# Everything below runs from .venv, which the first target that needs it makes. See CONTRIBUTING.md.

PYTHON  ?= python3
WORKERS ?= 2
SEED    ?= 0
ARGS    ?=

VENV  := .venv
STAMP := $(VENV)/.installed
GPUS  := $(words $(wildcard /dev/nvidia[0-9] /dev/nvidia[0-9][0-9] /dev/dxg))
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
PIP    = $(VENV)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt

# Ranks share the cores: more than one thread each makes them many times slower on a small machine.
export OMP_NUM_THREADS ?= 1
ifeq ($(GPUS),0)
export DS_ACCELERATOR ?= cpu
endif
# Compiled extensions look for ninja here. The path may hold spaces, so programs of .venv are started by its python.
RUN = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test demo check format clean

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'Variables: PYTHON=python3.12 (default python3, at least 3.11), WORKERS (test processes), SEED and RANKS (demo),'
	@echo 'ARGS (passed on), as in: make test ARGS="-k threshold -x"   make demo ARGS="--stop.window 24"'
	@echo
	@echo 'pip reads its usual environment variables, PIP_INDEX_URL and PIP_EXTRA_INDEX_URL among them. On Linux x86 without a GPU,'
	@echo "set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index before the first run: it saves gigabytes of CUDA packages."

venv: $(STAMP)  ## make .venv with all that test, demo and check need

test: $(STAMP)  ## run the tests
	@command -v cc >/dev/null || echo 'There is no C compiler: the tests of the C code are skipped, and decoding is slower.' >&2
	$(RUN) -m pytest -n $(WORKERS) $(ARGS)

demo: $(STAMP)  ## train a tiny pair of models from a bad student to a good one, in minutes, without a GPU
	$(RUN) launch/prepare_demo.py --out runs/demo-models --seed $(SEED)
	$(RUN) $(VENV)/bin/deepspeed --quiet --num_gpus $(RANKS) launch/train.py --config launch/recipes/demo.yaml $(ARGS)

check: $(STAMP)  ## lint, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)  ## repair lint and formatting in place
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## delete caches and build leftovers (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'Installing PyTorch and the other packages into $(VENV): a minute or two with fast access, once.'
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[test,eval,plot,dev]'
	@$(PIP) --no-deps liger-kernel  # triton comes with torch where there is a GPU; elsewhere it is 300 MB that nothing uses
	@touch $@

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo '$(PYTHON): not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$$("$(PYTHON)" -V) is too old: katds needs 3.11 or newer. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo '$(PYTHON) has no venv or ensurepip module. Install it (Debian, Ubuntu: python3-venv) or name another Python: make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
