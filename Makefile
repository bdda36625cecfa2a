# `make` lists the targets. Variables: PYTHON, TORCH (what pip installs), VENV, ARGS (for pytest),
# JOBS (processes of the tests, 0: this one).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
JOBS ?= $(if $(ARGS),0,2)
# several processes have a core each: threads of one that wait for a core of another cost more
THREADS := $(if $(filter-out 0,$(JOBS)),OMP_NUM_THREADS=1)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
FORMATTED := $(CSRC) $(wildcard tests/gpu/*.cpp tests/gpu/*.h)
# one stamp per requirement, so that another TORCH is installed when asked for
TORCH_STAMP := $(VENV)/.installed-$(subst =,-,$(subst /,-,$(TORCH)))
STAMP := $(VENV)/.installed-svf-fast
LEVELS := layer block backbone step prior

.PHONY: help venv demo test lint format bench race $(LEVELS:%=race-%) race-memory loading render \
  gpu asan gpu-sanitize cuda-check docs clean check-machine
.DEFAULT_GOAL := help
.NOTPARALLEL: # benchmarks want the machine for themselves

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv with torch, the package (editable) and the tools, if need be

demo: venv ## the main job on the embedded data: three regimes, table and pictures
	$(BIN)/python -m benchmarks.few_shot.regimes --config demo --folds 0 \
	  --out runs/demo --results runs/demo/regimes

test: venv ## run the tests; ARGS="-k chain" chooses
	OMP_WAIT_POLICY=passive $(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
	  --no-loadscope-reorder $(ARGS) # reordered, files of few long tests would come last

lint: venv ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: venv ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: venv ## fused against reference layers, blocks and prior mask: a table, and runs/bench.json
	mkdir -p runs
	$(BIN)/python -m pytest -o addopts=--import-mode=importlib benchmarks/bench_svf.py \
	  --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name \
	  --benchmark-json=runs/bench.json $(ARGS)

race: $(LEVELS:%=race-%) race-memory loading render ## every peer in turns, into benchmarks/results; alone: race-layer, -block, -backbone, -step, -prior

$(LEVELS:%=race-%): race-%: venv
	$(BIN)/python -m benchmarks.race --level $* $(ARGS)

race-memory: venv ## saved bytes and peaks at the sizes of the papers
	$(BIN)/python -m benchmarks.race.memory
	$(BIN)/python -m benchmarks.race.memory --models

loading: venv ## episodes a core loads, against what a step consumes
	$(BIN)/python -m benchmarks.few_shot.loading --workers 2

render: venv ## tables, picture and docs/benchmarks.md from benchmarks/results
	$(BIN)/python -m benchmarks.render

gpu: ## everything a GPU can show, in 13 minutes, with the torch of PYTHON; ARGS="--seconds 570"
	$(PYTHON) -m benchmarks.gpu $(ARGS)

cuda-check: venv ## compile all GPU kernels for sm_80 and sm_90: registers, spills; no GPU needed
	$(BIN)/python setup.py -q cuda_check
	$(BIN)/python -m svf_fast.triton.check

asan: venv ## the tests of the CPU ops under address and undefined-behaviour sanitizers
	$(BIN)/python -m pytest tests/robustness/test_sanitized_cpu.py $(ARGS)

gpu-sanitize: venv ## compute-sanitizer on the tests of the CUDA kernels; needs a GPU
	.ci/gpu-sanitize $(BIN)/python

docs: venv ## the pages of docs/ in build/docs, their links checked
	$(BIN)/mkdocs build --strict

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info svf_fast/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(TORCH_STAMP) setup.py pyproject.toml csrc/exports.map $(CSRC)
	$(PIP) install --no-build-isolation -e '.[test,dev,docs]'
	touch $@

$(TORCH_STAMP): | check-machine
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'pip>=23' 'setuptools>=77' ninja 'pybind11>=2.13' '$(TORCH)'
	rm -f $(VENV)/.installed-*
	touch $@

check-machine:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON) is not here: install Python >= 3.10 or name it, make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv (Debian: python3-venv)"; \
	  exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { \
	  echo "$(PYTHON) has no C headers (Python.h): install them (Debian: python3-dev)"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || command -v g++ > /dev/null || { \
	  echo "no C++ compiler: install g++ >= 11 or clang >= 14, or name one, make CXX=..."; exit 1; }
