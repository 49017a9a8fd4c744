# `make demo` and `make test` are all that a fresh clone needs: python3 >= 3.11, make, and a package index.
#
#   make check                                  style, types and the tests that are not marked slow
#   PYTHON=python3.12 make test                 another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Where this is set, each process that the tests start would compile the package again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check style types tests quick clean

demo: $(STAMP)
	$(BIN)/spmhub demo

# All at once: mypy has work for one core only, and most of a test's time is spent in one.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 3 style types tests

check: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 3 style types quick

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy --strict spm_hub

# Tests of a file run in one worker, which makes their fixtures once, until the other has none left and takes some.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not slow"

# Nearly all of these modules are never imported; those that are get compiled then.
COMPILE := $(BIN)/python -m compileall -q -x '/transformers/models/|/tests/' $(VENV)/lib

# torch first and alone: it is the one large download, and a failure of it should say so by itself.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spm-hub needs Python 3.11 or newer; try: PYTHON=python3.12 make")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
# pip would compile one file after the other: torch is compiled beside it, the rest on all cores. What no Python can
# compile are other programs' templates.
	@$(COMPILE) > /dev/null 2>&1 & \
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'; installed=$$?; wait; exit $$installed
# A test runs the benchmark suite's own command. Most of what it would bring along is for metrics that need downloads.
	$(BIN)/python -m pip install -q --no-compile --no-deps -c constraints.txt eval-unlearn python-dotenv
	@$(COMPILE) -j 0 > /dev/null 2>&1 || true
	@touch $@

clean:
	rm -rf $(VENV) demo
