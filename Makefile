# make setup | demo | test | long | wheel | oldest | docs | figures | lint: each sets up .venv first if it is not there yet.
# Needs Python 3.10 to 3.13 and make; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready

.PHONY: setup demo test long wheel oldest docs lint figures pictures clean

setup: $(READY)

# The tested torch comes first: a CPU build of exactly this version, so that nothing else pulls
# gigabytes of CUDA. pip prints errors only. To use your own CUDA or ROCm torch, see "Installing" in README.md.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq torch==2.13.0
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@echo "== $(VENV) is ready"
	@touch $(READY)

demo: $(READY)
	@echo "== demo: makes a tiny model and clips in ./demo, trains a LoRA, samples a video"
	$(BIN)/onewan demo --dir demo

# With ONETRAINER=PATH a copy of that OneTrainer checkout trains too (and with ONETRAINER_PYTHON=
# its interpreter, if that is not PATH/venv); docs/onetrainer.md says how. With COMFYUI=PATH that
# ComfyUI reads an embedding (COMFYUI_PYTHON= is its interpreter, by default that of the tests).
test: $(READY)
	@echo "== tests"
	ONETRAINER="$(ONETRAINER)" COMFYUI="$(COMFYUI)" $(BIN)/python -m pytest --numprocesses auto -m "not long"

# The tests that compare many combinations of methods, memory settings and interruptions.
long: $(READY)
	@echo "== long tests"
	$(BIN)/python -m pytest --numprocesses auto -m long

# The built wheel in an environment of its own: all data files, demo, import-config, train, inspect.
wheel: $(READY)
	@echo "== the wheel"
	$(BIN)/python scripts/check_installations.py wheel

# The tests that touch av, diffusers and transformers, with the versions in oldest-requirements.txt.
oldest: $(READY)
	@echo "== oldest supported packages"
	$(BIN)/python scripts/check_installations.py oldest

# The documentation as a site in build/site; a warning, such as a link to a page that is not there, is an error.
# The variable turns off an advertisement of the theme.
docs: $(READY)
	@echo "== the documentation, into build/site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)
	@echo "== ruff, codespell, types, import contracts"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests benchmarks docs README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# The performance figures: measures the quick benchmarks (some minutes), and writes benchmarks/results,
# the tables and charts of docs/performance.md, and one page with all figures.
figures: $(READY)
	@echo "== performance figures"
	$(BIN)/python benchmarks/report.py --results benchmarks/results --page build/figures/index.html --write

# All pictures of the documentation: pages that onewan writes (needs Chromium), charts of the results in
# benchmarks/results, and, from a copy of the checkout ONETRAINER=PATH, OneTrainer's window.
pictures: $(READY)
	@echo "== pictures, into docs/images"
	$(BIN)/python scripts/take_pictures.py docs/images
	$(BIN)/python benchmarks/report.py --from benchmarks/results --page build/figures/index.html --write
	$(if $(ONETRAINER),$(BIN)/python scripts/take_onetrainer_screenshots.py "$(ONETRAINER)" docs/images)

clean:
	rm -rf $(VENV) demo
