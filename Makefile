# `make demo` and `make test` are all that a fresh clone needs: python3 >= 3.11, make, and a package index.
#
#   PYTHON=python3.12 make test                 another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test style types tests clean

demo: $(STAMP)
	$(BIN)/spmhub demo

# All at once: mypy has work for one core only, and most of a test's time is spent in one.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 3 style types tests

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy --strict spm_hub

tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# torch first and alone: it is the one large download, and a failure of it should say so by itself.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spm-hub needs Python 3.11 or newer; try: PYTHON=python3.12 make")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
# pip would compile one file after the other: torch is compiled beside it, the rest on all cores. What no Python can
# compile are other programs' templates.
	@$(BIN)/python -m compileall -q $(VENV)/lib > /dev/null 2>&1 & \
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'; installed=$$?; wait; exit $$installed
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $@

clean:
	rm -rf $(VENV) demo
