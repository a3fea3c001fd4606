# Everything from nothing: each target first builds the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
READY := $(VENV)/.ready
OLDEST := 5.17.0

.PHONY: demo test lint needle bench test-oldest clean

demo: $(READY)
	$(BIN)/wildcat-kv demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

needle: $(READY)
	$(BIN)/python -m eval.needle

bench: $(READY)
	$(BIN)/python -m benchmarks.prefill --tokens 4096 --tokens 8000
	$(BIN)/python -m benchmarks.bounded
	$(BIN)/python -m benchmarks.merging

# torch goes first and alone: the pinned build may be one that only plain pip finds.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,eval]'
	touch $(READY)

# The oldest supported Transformers, in an environment of its own.
test-oldest: .constraints-oldest.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.constraints-oldest.txt

.constraints-oldest.txt: constraints.txt
	sed -E 's/^transformers==.*/transformers==$(OLDEST)/; /^(huggingface_hub|tokenizers)==/d' $< > $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info
