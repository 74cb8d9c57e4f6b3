# Everything lives in .venv and in the folder a command is told to write to; downloads stay in the user's cache folder.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
# Extra flags for `make demo`, e.g. DEMO_FLAGS="--source /data/fashion-mnist"
DEMO_FLAGS ?=
# Extra flags for `make bench-ingest`, e.g. BENCH_FLAGS="--only jpeg256"
BENCH_FLAGS ?=

.PHONY: install demo check test test-slow bench-ingest bench-train bench-generate bench-evaluate format clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/ganymede run --preset demo --out $(DEMO) $(DEMO_FLAGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

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
	rm -rf .venv .venv-peers .bench demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
