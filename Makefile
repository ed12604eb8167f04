# make help lists the targets.
PYTHON ?= python3
# On a machine with its own MPI: make .venv EXTRAS=demo,analysis,test
EXTRAS ?= mpi,demo,analysis,test
PROCESSES ?= 2
RESULTS ?= results/quickstart

BIN := .venv/bin
# The environment's own mpiexec if it has one, else the machine's.
MPIEXEC = $(if $(wildcard $(BIN)/mpiexec),$(BIN)/mpiexec,mpiexec)

.PHONY: help run reproduce figures test test-fast coverage lint format clean

help:  ## this list
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

run: .venv  ## train head_only, LoRA, SLoRA and FedARA on 2 processes, then draw the comparison
	$(MPIEXEC) -n $(PROCESSES) $(BIN)/fedara run bench/configs/quickstart.toml --results $(RESULTS)
	$(BIN)/python -m analysis $(RESULTS)

# A record's config again; its data, where they were a folder: make reproduce RECORD=DIR DATA=DIR
# DATA alone is semeval2010_task8: FedARA's run with seed 0 of the campaign. Neither: quickstart's.
REPRODUCED := $(if $(DATA),campaign/semeval/*-fedara-seed0-cf5a3a30e6,quickstart/*-fedara-*)
RECORD ?= $(firstword $(wildcard results/published/$(REPRODUCED)))
reproduce: .venv  ## run a committed record again and compare bits and accuracy: RECORD=DIR DATA=DIR
	$(MPIEXEC) -n $(PROCESSES) $(BIN)/fedara reproduce $(RECORD) \
	  $(if $(DATA),--set dataset.name=file:$(DATA))

figures: .venv  ## draw figures and table again, from the records in RESULTS
	$(BIN)/python -m analysis $(RESULTS)

test: .venv  ## the whole test suite, MPI and torchrun included; two tests at a time
	$(BIN)/python -m pytest -n 2

test-fast: .venv  ## the tests that are not marked slow: about 5 minutes on two cores
	$(BIN)/python -m pytest -n 2 -m "not slow"

coverage: .venv  ## the whole test suite, and the share of source lines that it runs
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

lint: .venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv: pyproject.toml constraints.txt  ## the environment, from constraints.txt
	@echo "installing into .venv: one to three minutes"
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]' || { rm -rf .venv; exit 1; }
	touch .venv

clean:  ## remove the environment and caches; results stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* *.egg-info
