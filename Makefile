# selfpruner: `make demo` shows it, `make test` proves it. Both install what is missing into .venv first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-oldest test-ray test-vllm test-llamacpp test-evaluate lint types clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LLAMACPP := .venv-llamacpp
JOBS ?= 2
SITE := import sysconfig; print(sysconfig.get_paths()['purelib'])
VLLM := .venv-vllm
OLDEST := .venv-oldest
RAY := .venv-ray

# The first Python on PATH that is new enough; `make install PYTHON=/path/to/python` takes another one.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$python"; break; }; done)
endif

# On Linux PyPI's torch is the CUDA build of several GB; this index has the one for CPUs, which pip prefers.
# For an NVIDIA GPU: `make install TORCH_INDEX=` in a fresh checkout (or after `make clean`).
ifeq ($(shell uname -s),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip says for every package and every try that an index cannot be reached or a folder is not there: once is enough.
define ONCE
2>&1 | awk '/^WARNING: Location .* is ignored/ {next} \
	/^WARNING: Retrying/ {host = match($$0, /host=.[^,]*/) ? substr($$0, RSTART + 6, RLENGTH - 7) : "an index"; \
		if (!told[host]++) print "make: " host " cannot be reached; pip goes on with the others"; next} \
	{print}'; exit $${PIPESTATUS[0]}
endef

# What runs long ends when make does, also when make is killed.
TIED := exec $(BIN)/python -P selfpruner/workers/lifeline.py $$PPID

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## everything pinned in constraints.txt, into .venv

# The stamp is written last, so an installation that was interrupted is done again, and one that is up to date is not.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "selfpruner needs Python 3.11 or later; none found on PATH. Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@"$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install --quiet "$$(grep '^pip==' constraints.txt)" $(ONCE)
	@# torch alone and first, with the packages its build asks for: none but ours on a CPU, NVIDIA's libraries for CUDA.
	@# Few retries: where only a mirror is reachable, the index above is not worth waiting for.
	@$(PIP) install --quiet --retries 2 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt "$$(grep '^torch==' constraints.txt)" $(ONCE)
	@# The rest is the whole list as it stands, so nothing is resolved and nothing unlisted comes along; see constraints.txt for why.
	@$(PIP) install --quiet --no-deps -r constraints.txt $(ONCE)
	@# setuptools warns of working directories with a folder of the package's name: that is what an editable installation is.
	@PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation -e . $(ONCE)
	@touch $@

demo: install ## search a real model over HTTP and verify the checkpoint
	$(TIED) -m selfpruner.cli.demo

test: install lint types ## lint, types and all tests but the slow ones
	@# Two processes with one torch thread each: many tests wait for servers and workers, and small tensors gain nothing from threads.
	OMP_NUM_THREADS=1 $(TIED) -m pytest -q -n 2 --dist loadfile

test-slow: install ## the heavy tests
	$(TIED) -m pytest -q -m slow --timeout 1800

test-gpu: install ## everything that only a GPU can show (8 minutes; needs `make install TORCH_INDEX=`)
	$(TIED) -m benchmarks.gpu

test-llamacpp: install $(LLAMACPP)/installed ## exports in llama.cpp, which is compiled first (minutes)
	OMP_NUM_THREADS=1 $(LLAMACPP)/bin/python -m pytest -q --timeout 1800 tests/service/test_gguf_llamacpp.py

# llama.cpp and what only it needs; all else is taken from .venv. `make test-llamacpp JOBS=8` compiles on so many cores.
$(LLAMACPP)/installed: constraints-llamacpp.txt | $(INSTALLED)
	"$(BIN)/python" -m venv --clear $(LLAMACPP)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$(SITE)")')" > "$$($(LLAMACPP)/bin/python -c "$(SITE)")/selfpruner-venv.pth"
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="-DLLAVA_BUILD=OFF" \
		$(LLAMACPP)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r constraints-llamacpp.txt $(ONCE)
	@touch $@

# The harness has an environment of its own, which sees the packages of .venv and adds what constraints-evaluate.txt lists.
EVALUATE := .venv-evaluate
$(EVALUATE)/installed: $(INSTALLED) constraints-evaluate.txt
	$(BIN)/python -m venv --without-pip $(EVALUATE)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(EVALUATE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/selfpruner-base.pth"
	@$(PIP) --python $(EVALUATE)/bin/python install --quiet --no-deps -r constraints-evaluate.txt $(ONCE)
	@touch $@

test-evaluate: $(EVALUATE)/installed ## zero-shot tasks with lm-evaluation-harness
	OMP_NUM_THREADS=1 $(EVALUATE)/bin/python -m pytest -q tests/service/test_harness.py

test-ray: install $(RAY)/installed ## jobs on a Ray cluster of several nodes on this machine (downloads 80 MB)
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -q tests/faults/test_ray.py tests/faults/test_workers.py tests/service/test_ray_job.py

# Ray and what only it needs; all else is taken from .venv.
$(RAY)/installed: constraints-ray.txt | $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(RAY)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c "$(SITE)")')" > "$$($(RAY)/bin/python -c "$(SITE)")/selfpruner-venv.pth"
	@$(PIP) --python $(RAY)/bin/python install --quiet --no-deps -r constraints-ray.txt $(ONCE)
	@touch $@

test-oldest: install $(OLDEST)/installed ## ordinary checkpoints in the oldest transformers that read them (downloads 0.1 GB)
	SELFPRUNER_OLDEST=$(abspath $(OLDEST)) OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -m slow --timeout 1800 tests/service/test_old_transformers.py

# A folder for each version, which goes before .venv on the path of the process that tries it.
$(OLDEST)/installed: constraints-oldest.txt | $(INSTALLED)
	rm -rf $(OLDEST)
	@{ grep -v '^#' constraints-oldest.txt | while read -r version packages; do \
		$(PIP) install --quiet --no-deps --target "$(OLDEST)/$$version" $$packages || exit 1; done; } $(ONCE)
	@touch $@

test-vllm: install $(VLLM)/installed ## pruned checkpoints in vLLM on the CPU (Linux; downloads 0.65 GB)
	SELFPRUNER_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/pytest -q -s -m slow --timeout 3600 tests/service/test_vllm.py

# selfpruner comes without its dependencies: beside vLLM it is a plugin, which needs nothing more than vLLM has.
$(VLLM)/installed: constraints-vllm.txt pyproject.toml | $(INSTALLED)
	"$(BIN)/python" -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet "$$(grep '^pip==' constraints.txt)" $(ONCE)
	$(VLLM)/bin/python -m pip install --quiet --retries 2 --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		"$$(grep '^torch==' constraints-vllm.txt)" $(ONCE)
	@$(VLLM)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt $(ONCE)
	@PYTHONWARNINGS=ignore $(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e . $(ONCE)
	@touch $@

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## mypy, strict
	$(BIN)/mypy

clean: ## remove all environments and caches; runs/ stays
	rm -rf $(VENV) $(RAY) $(VLLM) $(OLDEST) $(LLAMACPP) $(EVALUATE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
