# make audit: set up, fetch the default model, measure in a few minutes, write build/reports/. BUDGET=standard: all rows, larger
#   samples. BUDGET=full: into reports/ and README, however long it takes.
# make test: set up, run every test, and every notebook in smoke mode, with less data (make notebooks: these alone).
# make test-notebooks: set up, run every notebook in full.
# make interop: what llama.cpp and transformers compute from our files, and llama.cpp's speed, into build/reports/. Builds llama.cpp
#   from its sources and has an environment of its own for the others, in build/interop: needs cmake and a C++ compiler.
# make docs: set up, build the documentation site into build/site, check its links.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUDGET ?= quick
export TOKENIZERS_PARALLELISM := false
# Threads that wait give the core to those that work: else several processes at once hold each other up.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: audit test test-code test-slow test-later test-notebooks notebooks interop docs lint readme clean

audit: $(VENV)/.lab
	@$(BIN)/agentforge audit --budget $(BUDGET)
	$(if $(filter full,$(BUDGET)),$(BIN)/python tools/readme.py)

# Tests and notebooks side by side, a thread each: on two cores that is faster than one after the other with two threads.
# Whatever fails, the others still run.
# The default model is fetched before, once, and says so here: a notebook's checked outputs have no room for that.
test: $(VENV)/.dev
	$(BIN)/agentforge models smollm2-135m --json > /dev/null
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 --keep-going test-code test-later test-slow notebooks

# Tests of LATER reach hardly a line that no other reaches.
LATER := tests/audit/test_mutations.py tests/stages/test_conformance.py tests/test_architectures.py tests/test_real_model.py \
	tests/stages/test_vptq_real.py
# Coverage is of the quick tests: counting lines costs two fifths of their time, and slow ones reach hardly a line more.
# (Not pytest-cov: nbval would try to measure its kernels, too, and waits for them in vain.)
test-code: $(VENV)/.dev
	$(BIN)/python -m coverage run -m pytest -q --durations=25 tests $(LATER:%=--ignore=%)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -q --durations=25 tests $(LATER:%=--ignore=%)

test-later: $(VENV)/.dev
	$(BIN)/python -m pytest -m "" -q --durations=5 $(LATER)

# Cell by cell: fails where a cell does, or where the output of a cell tagged nbval-check-output is another one.
NBVAL := -q --durations=15 --nbval-lax --nbval-current-env --nbval-cell-timeout=900
notebooks: $(VENV)/.dev
	$(BIN)/python tools/notebooks.py --smoke
	$(BIN)/python -m pytest $(NBVAL) smoke

# In full, as they stand: half an hour.
test-notebooks: $(VENV)/.dev
	$(BIN)/python -m pytest $(NBVAL) notebooks

interop: $(VENV)/.lab
	$(BIN)/python benchmarks/interop.py --work build/interop --out build/reports/interop
	$(BIN)/python benchmarks/runtime.py --work build/interop --out build/reports/runtime --runs rounding:bits=4,group=64

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	$(BIN)/python tools/links.py build/site

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

readme: $(VENV)/.lab
	$(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) smoke build/site .coverage .mypy_cache .pytest_cache .ruff_cache

# Everything is pinned, with hashes, by the lock files; a set-up is repeated only when these, or pyproject.toml, change.
LOCKS := requirements.lock requirements-dev.lock requirements-cuda.lock
$(VENV)/.lab $(VENV)/.dev: $(LOCKS) pyproject.toml tools/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "agentforge needs Python 3.11 or newer, $(PYTHON) is older; run make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) tools/install.py $(if $(filter %.dev,$@),dev)
	@touch $@ $(if $(filter %.dev,$@),$(VENV)/.lab)
