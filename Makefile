# Two commands do all the set-up: `make serve` and `make test`. A second run installs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

PORT     ?= 8000
REPLICAS ?= 1
MODEL    ?= model/checkpoints/storyteller
ARGS     ?=
HOST     ?= http://127.0.0.1:$(PORT)
PROMETHEUS ?= 127.0.0.1:9090
SLO      ?= --slo ttft_p99=300ms --slo tpot_p99=30ms

# Engines to compare with: their own Python, and llama.cpp from the source distribution of its Python binding.
PEERS      ?= .venv-peers
CLIENTS    := .venv-clients
PEERS_JOBS ?= 1
LLAMA_CPP  := 0.3.36

.DELETE_ON_ERROR:
.PHONY: serve test faults check coverage loadtest capacity prometheus prometheus-test train compatibility evaluate peers lock clean

serve: $(VENV)/.serve
	@exec $(BIN)/attendant serve --model "$(MODEL)" --port $(PORT) --replicas $(REPLICAS) $(ARGS)

test: check coverage $(CLIENTS)/.clients
	$(BIN)/python -m pytest $(ARGS)

# What `make test` does a little of: kills, floods and hostile input, in full. It takes a while.
faults: $(VENV)/.test $(VENV)/.trace
	ATTENDANT_FAULTS=full $(BIN)/python -m pytest -m faults --timeout 1800 $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/coverage run -m pytest --quiet tests/model/test_scheduler.py tests/invariants/test_scheduler_machine.py
	$(BIN)/coverage report

check: $(VENV)/.test $(VENV)/.train $(VENV)/.load $(VENV)/.trace
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

loadtest: $(VENV)/.load
	$(BIN)/attendant-load run --host $(HOST) $(ARGS)

# The highest rate that keeps these objectives: about ten minutes with the service to itself.
capacity: $(VENV)/.load
	$(BIN)/attendant-load capacity --host $(HOST) $(SLO) $(ARGS)

# Prometheus (a package of Debian's) beside the running service, with our rules; `attendant top` needs nothing.
prometheus:
	@mkdir -p runs/prometheus
	@cp deploy/prometheus/prometheus.yml deploy/prometheus/rules.yml runs/prometheus
	@echo '[{"targets": ["127.0.0.1:$(PORT)"]}]' > runs/prometheus/targets.json
	prometheus --config.file=runs/prometheus/prometheus.yml --storage.tsdb.path=runs/prometheus/data \
	    --web.listen-address=$(PROMETHEUS) $(ARGS)

prometheus-test: $(VENV)/.test
	$(BIN)/python -m pytest tests/observe $(ARGS)

train: $(VENV)/.train
	$(BIN)/attendant train --out runs/storyteller $(ARGS)

compatibility: $(VENV)/.test
	$(BIN)/python -m tests.service.compatibility

evaluate: $(VENV)/.serve
	$(BIN)/attendant evaluate --model "$(MODEL)" $(ARGS)

peers: $(PEERS)/.peers $(PEERS)/.llama.cpp

lock:
	$(PYTHON) deploy/lock/compile.py

clean:
	rm -rf $(VENV) $(CLIENTS) *.egg-info

# Each stamp says that its lock file has been installed. The project itself is installed in place, once.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.python deploy/lock/serve.txt pyproject.toml service/attendant-haproxy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement deploy/lock/serve.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -m model.kernels.cpu.build
	@touch $@

$(VENV)/.%: $(VENV)/.serve deploy/lock/%.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement deploy/lock/$*.txt
	@touch $@

# Clients of others, in a Python of their own that sees what the tests have behind what it has itself.
$(CLIENTS)/.clients: $(VENV)/.test deploy/lock/clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -c 'import pathlib, sysconfig; \
	    packages = pathlib.Path(sysconfig.get_path("purelib")); \
	    (packages / "tests.pth").write_text(str(packages).replace("$(CLIENTS)", "$(VENV)"))'
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --requirement deploy/lock/clients.txt
	@touch $@

# torchvision comes with Optimum; nothing here needs it, and transformers fails to import beside it.
$(PEERS)/.peers: deploy/lock/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

$(PEERS)/.llama.cpp: export PATH := $(abspath $(PEERS))/bin:$(PATH)
$(PEERS)/.llama.cpp: $(PEERS)/.peers
	mkdir -p $(PEERS)/llama.cpp
	$(PEERS)/bin/python -m pip download --quiet --disable-pip-version-check --dest $(PEERS) --no-deps \
	    --no-binary llama-cpp-python --no-build-isolation llama-cpp-python==$(LLAMA_CPP)
	tar --extract --gzip --file $(PEERS)/llama_cpp_python-$(LLAMA_CPP).tar.gz --directory $(PEERS)/llama.cpp \
	    --strip-components 3 llama_cpp_python-$(LLAMA_CPP)/vendor/llama.cpp
	cmake -S $(PEERS)/llama.cpp -B $(PEERS)/llama.cpp/build -G Ninja -D CMAKE_BUILD_TYPE=Release \
	    -D GGML_NATIVE=ON -D LLAMA_CURL=OFF -D LLAMA_OPENSSL=OFF -D LLAMA_BUILD_UI=OFF
	cmake --build $(PEERS)/llama.cpp/build --parallel $(PEERS_JOBS) --target llama-batched-bench llama-server
	@touch $@
