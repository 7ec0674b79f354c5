# make demo   the whole road on data the project makes itself     make test   the tests
# make lint   what CI checks before it tests                       make help   all targets
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

DATA ?= input/demo
OUTPUT = output/$(notdir $(abspath $(DATA)))
EXPERIMENTS ?= small_gru small_attention_normed
N_FOLDS ?= 2
TRAIN ?= --overwrite --jobs 2 --workers 0

.PHONY: help install demo pipeline test test-slow lint format benchmark clean

help:  ## This list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## A .venv with the pinned packages.

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

demo: $(INSTALLED)  ## Synthetic birds -> folds -> training -> evaluation -> kernel -> score.
	$(BIN)/birdcall demo --data input/demo
	$(MAKE) --no-print-directory pipeline DATA=input/demo

pipeline: $(INSTALLED)  ## The same on any folder in the competition's layout: DATA=...
	$(BIN)/birdcall audit --data $(DATA) --cache
	$(BIN)/birdcall folds --data $(DATA) --n-folds $(N_FOLDS)
	$(BIN)/birdcall train --data $(DATA) $(EXPERIMENTS:%=--experiment %) $(TRAIN)
	$(BIN)/birdcall evaluate --data $(DATA)
	$(BIN)/birdcall package --data $(DATA) --dry-run
	@if [ -f $(DATA)/solution.csv ]; then \
	    $(BIN)/birdcall score $(OUTPUT)/submission.csv --data $(DATA); fi
	@echo "look at $(OUTPUT)/report.html"

test: $(INSTALLED)  ## Everything that takes seconds.
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## What takes longer.
	$(BIN)/pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(INSTALLED)  ## Front end and inference against librosa, torchlibrosa, nnAudio, the naive kernel.
	$(BIN)/birdcall benchmark frontend --data $(DATA)
	$(BIN)/birdcall benchmark inference --data $(DATA)

clean:  ## Forget what was made, keep .venv and the data.
	rm -rf output kernels/build
