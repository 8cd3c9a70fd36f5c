# Every target makes its own virtual environment where there is none and installs what it needs; a second call is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help test kernels check demo format clean

help:
	@echo "make demo    quantize the two small models of assets/ and compare the pictures (out/demo/report.html)"
	@echo "make test    run the tests"
	@echo "make kernels the part of 'make test' that compiles every CUDA kernel for every architecture"
	@echo "make check   formatting, lint, types and the import layers"
	@echo "make format  rewrite the sources as 'make check' wants them"
	@echo "make clean   remove what the targets above made"

# The stamp is younger than pyproject.toml exactly when what that file asks for is installed.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Two workers with a thread each: torch's own threads would fight over two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

kernels: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layering.py

demo: $(INSTALLED)
	$(BIN)/qdiff demo

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
