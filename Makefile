# `make quickstart` and `make test` prepare everything they need: Python >= 3.10 and a C++ compiler are enough.
PYTHON ?= python3
BIN = .venv/bin
SEEDS ?= 1
QUICKSTART_ARGS ?=
SOURCES = $(shell find csrc -type f) setup.py

.PHONY: help quickstart test lint format build aot bench clean

help:
	@echo "make quickstart [SEEDS=1,2,3]  teacher -> cache -> student on real text, table and picture in runs/quickstart"
	@echo "make test                      every test that can run on this machine"
	@echo "make lint | format             ruff and mypy | ruff format"
	@echo "make build                     the C++ extension, in place"
	@echo "make aot                       compile every Triton and CUDA kernel ahead of time, no GPU needed"
	@echo "make bench                     kdfast against its peers on this machine"

# Python first, then the extension in place: it is rebuilt, incrementally, whenever a source is newer.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	KDFAST_BUILD=none $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,bench,dev]'
	@touch .venv/installed

.venv/built: .venv/installed $(SOURCES)
	@echo "building the C++ extension: what has changed, a minute or two from nothing"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch .venv/built

build: .venv/built

quickstart: build
	$(BIN)/kdfast quickstart --seeds $(SEEDS) $(QUICKSTART_ARGS)

test: build
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: build
	$(BIN)/kdfast bench aot

bench: build
	$(BIN)/kdfast bench full logits
	$(BIN)/kdfast bench full linear
	$(BIN)/kdfast bench full topk
	$(BIN)/kdfast bench full attention

clean:
	rm -rf build *.egg-info kdfast/_C*.so kdfast/_cuda*.so .mypy_cache .ruff_cache .pytest_cache
