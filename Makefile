# Two commands do all the set-up: `make serve` and `make test`. A second run installs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

PORT     ?= 8000
REPLICAS ?= 1
MODEL    ?= model/checkpoints/storyteller
ARGS     ?=
HOST     ?= http://127.0.0.1:$(PORT)

.DELETE_ON_ERROR:
.PHONY: serve test check coverage loadtest train evaluate lock clean

serve: $(VENV)/.serve
	@exec $(BIN)/attendant serve --model "$(MODEL)" --port $(PORT) --replicas $(REPLICAS) $(ARGS)

test: check coverage
	$(BIN)/python -m pytest $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/coverage run -m pytest --quiet tests/model/test_scheduler.py tests/invariants/test_scheduler_machine.py
	$(BIN)/coverage report

check: $(VENV)/.test $(VENV)/.train $(VENV)/.load
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

loadtest: $(VENV)/.load
	$(BIN)/locust --config loadtest/locust.conf --host $(HOST) $(ARGS)

train: $(VENV)/.train
	$(BIN)/attendant train --out runs/storyteller $(ARGS)

evaluate: $(VENV)/.serve
	$(BIN)/attendant evaluate --model "$(MODEL)" $(ARGS)

lock:
	$(PYTHON) deploy/lock/compile.py

clean:
	rm -rf $(VENV) *.egg-info

# Each stamp says that its lock file has been installed. The project itself is installed in place, once.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.python deploy/lock/serve.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement deploy/lock/serve.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.%: $(VENV)/.serve deploy/lock/%.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement deploy/lock/$*.txt
	@touch $@
