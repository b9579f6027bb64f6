# Stable Diffusion from Scratch. `make` alone lists the commands.
#
# Variables: PYTHON (which interpreter makes the environment), VENV (where it goes),
# TORCH=auto|cpu|default (which torch build), PORT and LAB_ARGS (for JupyterLab),
# PROMPT, OUT and GUIDE, the strength of guidance (for `make image`), JOBS, how many test
# files run at a time (for `make test`; each takes a core and up to 4 GB).

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= auto
PORT    ?= 8888
PROMPT  ?= a fox to the left of a pizza, blue background
OUT     ?=
GUIDE   ?= 2.5
CONFIG  ?= configs/vae.yaml configs/clip.yaml configs/close_ups.yaml configs/unet.yaml
TESTS   ?= tests chapters
JOBS    ?= 2

BIN     := $(VENV)/bin
INSTALL ?= $(PYTHON) tools/install.py --venv $(VENV) --torch $(TORCH)

# Idle threads must not spin: two torch threads beside one busy program are otherwise up to
# seventy times slower. It has to be set before Python starts.
export OMP_WAIT_POLICY = passive
# The environment's own kernels and packages, not those of a user-wide installation.
export JUPYTER_PREFER_ENV_PATH = 1
export PYTHONNOUSERSITE = 1

.DEFAULT_GOAL := help
.PHONY: help lab test test-full test-gpu book export restore image train clean

help: ## list these commands
	@echo "Stable Diffusion from Scratch"
	@echo
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)
	@echo
	@echo "Begin with: make lab"

lab: ## install what is missing and open the course in JupyterLab (chapter 00)
	@$(INSTALL) course
	@if [ "$$(id -u)" = 0 ] && ! echo " $(LAB_ARGS) " | grep -q -e --allow-root; then \
		echo "You are root (a container?). JupyterLab refuses that unless you say:"; \
		echo "  make lab LAB_ARGS=--allow-root"; exit 1; fi
	@echo "JupyterLab opens chapter 00 in the browser; if none opens, follow the address"
	@echo "below. If port $(PORT) is busy, it takes the next free one. Ctrl-C twice ends it."
	@exec $(BIN)/python -m jupyterlab --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/chapters/00_welcome.ipynb \
		--ServerApp.port=$(PORT) $(LAB_ARGS)

test: ## install what is missing and run every test and every chapter
	@$(INSTALL) dev
	$(BIN)/ruff check .
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -p no:cacheprovider -n $(JOBS) --dist loadfile --nbval \
		--nbval-current-env --nbval-cell-timeout=300 \
		--nbval-sanitize-with tests/nbval_sanitize.cfg $(TESTS)

test-full: ## the tests that are too long or too large for `make test`
	@$(INSTALL) dev
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -p no:cacheprovider -m full tests

test-gpu: ## the chapters that can use a GPU, on a pretended one
	@$(INSTALL) dev
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -p no:cacheprovider -m gpu tests

book: ## build the web pages: _build/html/index.html
	@$(INSTALL) book
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "Open _build/html/index.html"

export: ## write sdlib from the chapters: later chapters then run with your code
	@$(INSTALL) course
	@$(BIN)/python tools/export.py export

restore: ## bring the committed sdlib back (your chapters stay as they are)
	@$(INSTALL) course
	@$(BIN)/python tools/export.py restore

# The prompt travels through the environment, so that quotes in it do no harm.
image: export SD_PROMPT = $(value PROMPT)
image: ## paint a picture: make image PROMPT="two red hearts" OUT=hearts.png
	@$(INSTALL) course
	@$(BIN)/python -m sdlib.pipeline "$$SD_PROMPT" --guidance $(GUIDE) $(if $(OUT),--out "$(OUT)")

train: ## train the small model, hours: all parts, or CONFIG=configs/unet.yaml
	@$(INSTALL) course
	@for config in $(CONFIG); do $(BIN)/python -m sdlib.training $$config || exit 1; done

clean: ## remove the environment, built pages and caches (not your work)
	rm -rf $(VENV) _build sdlib.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-type d -exec rm -rf {} +
