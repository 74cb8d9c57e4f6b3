# Everything lives in .venv and in the folder a command is told to write to; downloads stay in the user's cache folder.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
# Extra flags for `make demo`, e.g. DEMO_FLAGS="--source /data/fashion-mnist"
DEMO_FLAGS ?=
# Extra flags for `make bench-ingest`, e.g. BENCH_FLAGS="--only jpeg256"
BENCH_FLAGS ?=
# Extra flags for `make cluster`, e.g. CLUSTER_FLAGS="--workers 3 --cpus 8", and for `make cluster-down`, --remove-data
CLUSTER_FLAGS ?=

.PHONY: install demo cluster cluster-down check test test-slow test-long bench-ingest bench-train bench-generate bench-evaluate format lock audit clean

install: .venv/installed

# First what is locked, so that torch finds all but its own libraries in place. infra/lock.py says why torch is not locked.
.venv/installed: pyproject.toml requirements.lock requirements-dev.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet "$$(grep -o 'torch==[0-9.]*' pyproject.toml)"
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $@

# Versions that still fit stay; remove a pin from its file to have the newest one.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	.venv-lock/bin/python infra/lock.py .venv-lock/bin/uv
	rm -r .venv-lock

# Known vulnerabilities of what is locked; where the service cannot be asked it says so and goes on.
audit: install
	$(BIN)/python infra/audit.py

demo: install
	$(BIN)/ganymede run --preset demo --out $(DEMO) $(DEMO_FLAGS)

# Ray and an S3 server on this machine, for `ray job submit`; they run until cluster-down. infra/cluster.py says more.
cluster: install
	$(BIN)/python infra/cluster.py up $(CLUSTER_FLAGS)

cluster-down:
	$(BIN)/python infra/cluster.py down $(CLUSTER_FLAGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

# For a night: also several nodes, the whole demo, and the same guarantees in more combinations and by more kills.
test-long: install
	KILLS=$${KILLS:-100} $(BIN)/python -m pytest -m "slow or long"

# Data, made once, go to .bench; the peers have an environment of their own, since they bring torchvision.
bench-ingest: install .venv-peers/installed
	$(BIN)/python -m tests.benchmarks.ingest --peers-python .venv-peers/bin/python $(BENCH_FLAGS)

bench-train: install
	$(BIN)/python -m tests.benchmarks.train $(BENCH_FLAGS)

bench-generate: install
	$(BIN)/python -m tests.benchmarks.generate $(BENCH_FLAGS)

bench-evaluate: install
	$(BIN)/python -m tests.benchmarks.evaluate $(BENCH_FLAGS)

.venv-peers/installed: tests/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement tests/benchmarks/peers.txt
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	[ ! -e .cluster/state.json ] || $(BIN)/python infra/cluster.py down --remove-data
	rm -rf .venv .venv-lock .venv-peers .bench .cluster demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
