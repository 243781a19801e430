# make search  install, run the reference study, export its winner
# make test    install, run every test
# make lint    format, lint, imports, types
# make check   a developer's loop: lint and the fast tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: install search test lint check format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

search: $(INSTALLED)
	$(BIN)/ssm-mp search studies/reference.toml
	$(BIN)/ssm-mp export studies/reference.toml --out exports/reference --force
	@echo "report: runs/reference/report.html, to read in a browser; report.md"

test: $(INSTALLED_DEV)
	$(BIN)/pytest -n 2 --dist loadgroup

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -n 2 -m 'not slow'

format: $(INSTALLED_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs exports .mypy_cache .ruff_cache .pytest_cache
