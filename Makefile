# Two commands are enough: `make demo` and `make test`. Both do all the set-up themselves, once.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
WORKLOAD ?= S16
WHAT ?= train
STAMP := $(VENV)/.installed
NEEDED_GB := 9

.PHONY: help demo test lab bench export check mutations lint-lessons weights clean-runs setup
.DEFAULT_GOAL := help

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# ------------------------------------------------------------------------------------------------ set-up
setup: $(STAMP)  ## virtual environment, pinned install, notebook kernel (skipped when up to date)

$(STAMP): settings.ini setup.py constraints.txt
	@set -e; python=""; \
	for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do \
	  if command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "ldm_edu needs Python 3.10 to 3.13, and found $$(python3 --version 2>&1 || true). Install one, or name it: make demo PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	free=$$(df -Pk . | awk 'NR==2 {print int($$4/1048576)}'); \
	if [ ! -x $(BIN)/python ] && [ "$$free" -lt $(NEEDED_GB) ]; then \
	  echo "ldm_edu needs $(NEEDED_GB) GB of free disk for PyTorch and the rest, and $$free GB are free here. Make room, or put the environment elsewhere: make demo VENV=/path/with/room" >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$($$python --version) (once; two to five minutes)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV) || { echo "$$python cannot make a virtual environment: install its venv package (on Debian: apt install python3-venv)" >&2; exit 1; }; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"; \
	$(BIN)/python -m pip check; \
	touch $(STAMP)

# ------------------------------------------------------------------------------------------------ use
demo: $(STAMP)  ## train a text-to-image model from nothing; report in runs/demo
	@$(BIN)/ldm-edu demo --out $(OUT)

lab: $(STAMP)  ## open the lessons in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir nbs

bench: $(STAMP)  ## our network beside diffusers' on this machine, as a table: make bench WORKLOAD=S8 WHAT=sample
	@$(BIN)/ldm-edu bench --workload $(WORKLOAD) --what $(WHAT)

# ------------------------------------------------------------------------------------------------ maintain
export: $(STAMP)  ## rebuild ldm_edu/ from the notebooks
	@rm -f $$(ls ldm_edu/*.py | grep -v '__init__\|__main__') && $(BIN)/nbdev_export

check: $(STAMP)  ## the fast gate: export in sync, orphans, ids, sizes, import DAG, ruff, forbidden flags
	@$(BIN)/ruff check ldm_edu tests setup.py
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_hygiene.py

lint-lessons: $(STAMP)  ## the lessons' measures against the house style, as a table
	@$(BIN)/python tests/lesson_measures.py

mutations: $(STAMP)  ## inject the field's known bugs into copies of the library; a test must catch each
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_mutations.py

# The lessons run at full length, so that what is checked is what the committed outputs show.
# Every process of the tests refuses connections that leave the machine (tests/offline/sitecustomize.py).
test: $(STAMP)  ## everything: the gate, all lessons, all tests, coverage; offline
	@$(BIN)/ruff check ldm_edu tests setup.py
	@PYTHONPATH="$(CURDIR)/tests/offline" HF_HUB_OFFLINE=1 LDM_EDU_PROFILE=cpu OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal --cov=ldm_edu --cov-report=term --cov-fail-under=90 $(ARGS)

PACK = --first-stage scenes-kl-f4 --measures.seed 1234 --overwrite
weights: $(STAMP)  ## train the shipped models again (nine hours on two cores) into data/pretrained; PICTURES=folder of CIFAR-10 also the perceptual network
	@$(BIN)/ldm-edu train-features --out data/pretrained/scenes-features --overwrite
	@test -z "$(PICTURES)" || $(BIN)/ldm-edu train-perceptual --data $(PICTURES) --out data/pretrained/scenes-perceptual --overwrite
	@$(BIN)/ldm-edu train-autoencoder --recipe kl-f4-tiny --out runs/weights/scenes-kl-f4
	@$(BIN)/ldm-edu pack --model runs/weights/scenes-kl-f4 --out data/pretrained/scenes-kl-f4 --measures.seed 1234 --overwrite
	@$(BIN)/ldm-edu train --recipe text-tiny --items 30000 --first-stage scenes-kl-f4 --out runs/weights/scenes-words
	@$(BIN)/ldm-edu train --recipe text-relations --items 40000 --relations 0.75 --first-stage scenes-kl-f4 \
	  --start-from runs/weights/scenes-words --out runs/weights/scenes-text
	@$(BIN)/ldm-edu train --recipe class-tiny --items 30000 --objects 1 1 --first-stage scenes-kl-f4 --out runs/weights/scenes-class
	@for name in layout semantic superres superres-regression inpaint; do \
	  $(BIN)/ldm-edu train --recipe $$name-tiny --items 30000 --first-stage scenes-kl-f4 --out runs/weights/scenes-$$name; done
	@$(BIN)/ldm-edu pack --model runs/weights/scenes-text --out data/pretrained/scenes-text $(PACK)
	@$(BIN)/ldm-edu pack --model runs/weights/scenes-class --out data/pretrained/scenes-class $(PACK) --measures.prompts 512 --measures.objects 1 1
	@for name in layout semantic superres inpaint; do \
	  $(BIN)/ldm-edu pack --model runs/weights/scenes-$$name --out data/pretrained/scenes-$$name $(PACK) --measures.prompts 512; done
	@$(BIN)/ldm-edu pack --model runs/weights/scenes-superres-regression --out data/pretrained/scenes-superres-regression \
	  $(PACK) --measures.prompts 512 --measures.steps 1

clean-runs:  ## delete runs/
	@rm -rf runs
