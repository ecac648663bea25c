# Everything a fresh machine needs: `make demo` hears the machinery work, `make test` checks all of it.

PYTHON ?= python3
VENV := .venv
VENV_517 := .venv-5.17
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# One thread a process: the tests run in several processes, and a tiny matrix gains nothing from more.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST_FLAGS ?= -n auto --maxprocesses=4

# Folders too, so that a removed file counts as a change.
SOURCES := $(shell find lowvram quant offload -name __pycache__ -prune -o \
    \( -type d -o -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name py.typed \) -print)

.PHONY: help demo test lint types unit oracle-5.17 interop compiler clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo         install into $(VENV), run the built-in model on demos/media, write lowvram.wav'
	@echo 'make test         install with the test extra; lint, types on the built wheel, all tests'
	@echo 'make lint         ruff check and ruff format --check'
	@echo 'make types        mypy on the built wheel'
	@echo 'make unit         the tests alone (PYTEST_FLAGS="-k planner" for some of them)'
	@echo 'make oracle-5.17  the comparison with transformers 5.17.0, in $(VENV_517)'
	@echo 'make interop      other readers of AWQ files, in .venv-interop, on what is quantized here'
	@echo 'make clean        remove environments, builds and caches'
	@echo 'PYTHON=python3.12 chooses the interpreter (3.11 or newer)'

demo: $(VENV)/.installed
	$(ONE_THREAD) $(BIN)/lowvram-demo --image demos/media/picture.png --audio demos/media/recording.flac \
	    --video demos/media/clip.mp4 -o lowvram.wav

test: compiler lint types unit

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build/types.stamp

unit: $(VENV)/.tested
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_FLAGS)

oracle-5.17: $(VENV_517)/.installed
	$(ONE_THREAD) $(VENV_517)/bin/python -m pytest -m oracle $(PYTEST_FLAGS)

# A reader that cannot be installed here is named with the reason; a difference fails.
interop: $(VENV)/.installed
	$(ONE_THREAD) $(BIN)/python tests/interop/run.py --environments .venv-interop

# Types are checked on what a user gets: the wheel, with `quant/` and `offload/` inside `lowvram`.
build/types.stamp: $(SOURCES) pyproject.toml $(VENV)/.tested
	rm -rf build/lib build/bdist.* build/wheel build/site
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PIP) install --quiet --no-deps --no-compile --target build/site build/wheel/*.whl
	cd build/site && test -f lowvram/py.typed && $(CURDIR)/$(BIN)/mypy \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p lowvram
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	    'error: "$(PYTHON)" is not Python 3.11 or newer; try: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

# The second environment appends the first one's packages to its own, so that torch is installed
# once; only what constraints-5.17.txt pins differently is installed anew, and shadows the first.
$(VENV_517)/.installed: constraints-5.17.txt $(VENV)/.tested
	rm -rf $(VENV_517)
	$(BIN)/python -m venv --without-pip $(VENV_517)
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	own=$$($(VENV_517)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$packages')" > "$$own/shared.pth"
	$(VENV_517)/bin/python -m pip install --quiet -c constraints-5.17.txt transformers
	$(VENV_517)/bin/python -c 'import transformers; assert transformers.__version__ == "5.17.0"'
	@touch $@

compiler:
	@for cxx in $$CXX c++ g++ clang++; do \
	    echo '#include <vector>' | $$cxx -x c++ -fsyntax-only - 2>/dev/null && exit 0; \
	done; \
	echo 'error: no working C++ compiler (tried $$CXX, c++, g++, clang++); install g++ or clang' >&2; \
	exit 1

clean:
	rm -rf $(VENV) $(VENV_517) .venv-interop build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lowvram quant offload demos tests -name __pycache__ -type d -prune -exec rm -rf {} +
