# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DATA ?=
FAULTS_ELSEWHERE := tests/unit/fl_server/test_tunnel_server.py
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow faults lint format bench clean

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("fieldfleet needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed-all

demo: $(VENV)/.installed-all  ## the main job, from pretraining to inference on the devices
	$(BIN)/fieldfleet demo --out $(OUT) $(if $(DATA),--data $(DATA))

test: lint  ## everything that CI runs
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(VENV)/.installed-dev  ## all tests, the slow ones too
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	$(BIN)/python -m pytest

faults: $(VENV)/.installed-dev  ## the fault matrix, all of it, as a table with recovery times (also runs/faults.json)
	$(BIN)/python -m pytest tests/faults $(FAULTS_ELSEWHERE) --fault-table runs/faults.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev  ## every speed and quality claim of the README (real data: FIELDFLEET_DATA)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs build *.egg-info
