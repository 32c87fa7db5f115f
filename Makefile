# make quickstart   install into .venv, then run the first paper
# make test         install into .venv, then everything that CI checks
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: quickstart test install install-dev lint verify bench clean

quickstart: .venv/.installed
	$(BIN)/paperzoo run wide_resnet

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

verify: .venv/.installed-dev
	$(BIN)/paperzoo verify --all --processes 2

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/run.py

install: .venv/.installed
install-dev: .venv/.installed-dev

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/.installed $@

clean:
	rm -rf .venv build dist src/*.egg-info
