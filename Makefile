# Every target creates or reuses .venv, so each one works as the first command on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export TOKENIZERS_PARALLELISM ?= false

PAPERS := experiments/beem experiments/beem-table experiments/beem-speed experiments/eenet-cifar10 experiments/eenet-checks experiments/eenet-sst2 experiments/eenet-ag_news experiments/scenes experiments/flickr8k experiments/coco experiments/heads experiments/parity
.PHONY: help quickstart sst2 test test-web bench lint format docs clean results $(PAPERS)

help: ## list the targets
	@grep -hE '^[a-z0-9_/-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 26

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing pulls another build of it
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing offramp into $(VENV) (about a minute on a fresh machine) ..."
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.core ## train a small network with exits, calibrate, and time it
	$(BIN)/offramp quickstart

sst2: $(VENV)/.dev ## the same on SST-2 with MiniLM (set OFFRAMP_DATA=DIR; 6 to 25 minutes of training, 6 of timing)
	$(BIN)/offramp quickstart --task sst2 $(if $(OFFRAMP_DATA),--data $(OFFRAMP_DATA))

test: $(VENV)/.dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-web: $(VENV)/.dev ## check that Python, Node and a web page decide alike (needs Node 20 and Chromium; set OFFRAMP_DATA=DIR for real sentences)
	@command -v npm > /dev/null || { echo "npm is not here: install Node 20 or later."; exit 1; }
	cd examples/web && npm ci --ignore-scripts --loglevel=error
	OMP_NUM_THREADS=1 $(BIN)/python examples/web/check.py $(ARGS)

bench: $(VENV)/.dev ## measured time of stages, exits and policies on this machine
	$(BIN)/python benchmarks/bench.py $(ARGS)

DATA = $(or $(OFFRAMP_DATA),$(error set OFFRAMP_DATA=DIR, the folder with the data sets))

experiments/beem: $(VENV)/.dev ## train what BEEM's table and the recipes need: hours; ARGS='--list' says how many (set OFFRAMP_DATA=DIR)
	$(BIN)/python -m experiments.beem.run --data $(DATA) $(ARGS)

experiments/beem-table: $(VENV)/.dev ## judge policies and recipes on what results/beem has
	$(BIN)/python -m experiments.beem.table $(ARGS)

experiments/beem-speed: $(VENV)/.dev ## measure the speed of the trained exits, idle machine, half an hour (set OFFRAMP_DATA=DIR)
	for task in sst2 rte mrpc cola qnli; do $(BIN)/python -m experiments.beem.speed $$task --data $(DATA) $(ARGS) || exit 1; done

experiments/eenet-cifar10: $(VENV)/.dev ## train ResNet-56 with exits on CIFAR-10, hours, and judge policies (set OFFRAMP_DATA=DIR)
	for network in basic tuned; do $(BIN)/python -m experiments.eenet.train $$network --data $(DATA) $(ARGS) || exit 1; done
	for name in cifar10 cifar10-tuned; do $(BIN)/python -m experiments.eenet.timed $$name --data $(DATA) && \
		$(BIN)/python -m experiments.eenet.table $$name || exit 1; done

experiments/eenet-checks: $(VENV)/.dev ## an epoch of 2,000 images for the papers' larger networks (set OFFRAMP_DATA=DIR)
	for network in resnet56 densenet121 msdnet; do \
		$(BIN)/python -m experiments.eenet.train $$network --data $(DATA) --epochs 1 --limit 2000 || exit 1; done

experiments/eenet-sst2 experiments/eenet-ag_news: experiments/eenet-%: $(VENV)/.dev
	$(BIN)/python -m experiments.eenet.table $*

experiments/scenes experiments/coco: experiments/%: $(VENV)/.dev ## train decoders with token-level exits, hours, and judge policies (set OFFRAMP_DATA=DIR)
	for variant in joint joint-exits plain shallow-1 shallow-2 shallow-3 shallow-4 $(MORE_$*); do \
		$(BIN)/python -m experiments.tokens.train $* $$variant --data $(DATA) || exit 1; done
	for variant in joint-exits $(MORE_$*); do $(BIN)/python -m experiments.tokens.table $* $$variant --data $(DATA) || exit 1; done
	$(BIN)/python -m experiments.tokens.speed $* joint-exits --data $(DATA)

MORE_scenes := exits whole-keys

experiments/flickr8k: $(VENV)/.dev ## the same on photographs of Flickr8k (set OFFRAMP_DATA=DIR)
	for variant in plain exits heads; do \
		$(BIN)/python -m experiments.tokens.train flickr8k $$variant --data $(DATA) || exit 1; done
	for variant in exits heads; do $(BIN)/python -m experiments.tokens.table flickr8k $$variant --data $(DATA) || exit 1; done

experiments/heads: $(VENV)/.dev ## kinds of vocabulary heads on a decoder of COCO's texts (set OFFRAMP_DATA=DIR)
	for variant in plain exits; do $(BIN)/python -m experiments.tokens.train coco $$variant --data $(DATA) || exit 1; done
	$(BIN)/python -m experiments.tokens.heads --data $(DATA)

experiments/parity: $(VENV)/.dev ## compare tokens with transformers and with no cache, ten minutes; trained decoders where they are (set OFFRAMP_DATA=DIR)
	$(BIN)/python -m experiments.tokens.parity --data $(DATA)

results: $(VENV)/.dev ## make the tables and pictures of docs/results.md from results/
	$(BIN)/python -m experiments.render

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks experiments examples docs
	$(BIN)/ruff format --check src tests benchmarks experiments examples docs
	$(BIN)/mypy

docs: $(VENV)/.dev ## build the site into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

format: $(VENV)/.dev ## rewrite the code in the house's format
	$(BIN)/ruff check --fix src tests benchmarks experiments examples docs
	$(BIN)/ruff format src tests benchmarks experiments examples docs

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
