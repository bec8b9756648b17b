# make setup | demo | test | long | test-gpu | dist | wheel | oldest | newest | beside-onetrainer | audit | docs | figures | lint: each sets up .venv first if it is not there yet.
# Needs Python 3.10 to 3.13 and make; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
else
  BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready

.PHONY: setup demo test long test-gpu dist wheel oldest newest beside-onetrainer audit docs lint figures pictures clean

setup: $(READY)

# The tested torch comes first: a CPU build of exactly this version, so that nothing else pulls
# gigabytes of CUDA. pip prints errors only. To use your own CUDA or ROCm torch, see docs/installing.md.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) with $$($(PYTHON) --version): PyTorch for the CPU, onewan, and tools (some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq torch==2.13.0
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@echo "== $(VENV) is ready"
	@touch $(READY)

demo: $(READY)
	@$(BIN)/onewan demo --dir demo

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

# The tests that take an accelerator, on a real one: make test-gpu DEVICE=xpu. Needs a PyTorch that computes on it in
# .venv (docs/installing.md).
DEVICE ?= cuda
test-gpu: $(READY)
	@echo "== tests on $(DEVICE)"
	ONEWAN_TEST_DEVICE="$(DEVICE)" $(BIN)/python -m pytest --numprocesses 4 -m accelerator

# The wheel and the source distribution into dist/, with a bill of materials and the licences of what is installed
# with them. Built twice, they have the same bytes.
dist: $(READY)
	@echo "== the wheel, the source distribution and the bill of materials, into dist"
	$(BIN)/python scripts/installations dist

# The built wheel in an empty environment, with an empty HOME and no compiler: all data files, doctor, demo, report,
# import-config, train, inspect; the licences of what comes with it.
wheel: $(READY)
	@echo "== the wheel"
	$(BIN)/python scripts/installations wheel

# The same with every package at its lower bound in pyproject.toml, and the tests that touch those packages. PyTorch is
# the tested version; with TORCH_INDEX=ADDRESS, an index of CPU builds, it is at its lower bound too.
oldest: $(READY)
	@echo "== oldest supported packages"
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python scripts/installations oldest

# The same with the newest packages that pyproject.toml allows: not in .ci/run, since a release of another project
# would fail a change of this one.
newest: $(READY)
	@echo "== newest packages"
	$(BIN)/python scripts/installations newest

# What pip would change of OneTrainer's pins (nothing), and the same tests with them.
beside-onetrainer: $(READY)
	@echo "== beside OneTrainer's pins"
	$(BIN)/python scripts/installations onetrainer

# Known vulnerabilities of what is in .venv. Where the service that knows them does not answer, the output says so;
# with AUDIT=required that is an error.
audit: $(READY)
	@echo "== known vulnerabilities"
	AUDIT="$(AUDIT)" $(BIN)/python scripts/installations audit

# The documentation as a site in build/site; a warning, such as a link to a page that is not there, is an error.
# The variable turns off an advertisement of the theme.
docs: $(READY)
	@echo "== the documentation, into build/site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)
	@echo "== ruff, codespell, types, import contracts, schemas"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests benchmarks docs README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

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
