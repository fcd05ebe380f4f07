# Every target works as the first command in a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that are installed: those that the tests pass with, or with none the newest.
CONSTRAINTS ?= constraints.txt
PINNED_TORCH := $(if $(CONSTRAINTS),$(shell sed -n 's/^torch==//p' $(CONSTRAINTS)))
TORCH ?= $(PINNED_TORCH)
LIMITS := $(VENV)/constraints.txt
PIP = $(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(LIMITS) --build-constraint $(LIMITS))
# Where a machine without an NVIDIA GPU finds torch's CPU build, if pip does not know of one already.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: help install demo test test-fast test-latest test-faults coverage lint format docs bench sanitize \
  sanitize-address sanitize-thread gpu-first \
  gpu-install gpu-test gpu-sanitize gpu-profile gpu-bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## Make .venv with the package, editable, and all that its development needs

# pip comes first and by itself: an old one does not know --build-constraint. torch for GPUs, and another
# version of torch than the tested one, take the triton that they ask for.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
ifneq ($(CONSTRAINTS),)
	sed -e 's/^torch==.*/torch==$(TORCH)/' $(if $(HAS_GPU)$(filter-out $(PINNED_TORCH),$(TORCH)),-e '/^triton==/d') \
	  $(CONSTRAINTS) >$(LIMITS)
endif
	$(BIN)/python -m pip install --quiet --upgrade pip $(if $(CONSTRAINTS),--constraint $(LIMITS))
ifeq ($(HAS_GPU),yes)
	$(PIP) torch$(TORCH:%===%)
else
	$(PIP) "torch==$(or $(TORCH),$(NEWEST_CPU_TORCH))+cpu" 2>/dev/null || \
	  $(BIN)/pip install --quiet --no-deps torch$(TORCH:%===%) --index-url $(TORCH_CPU_INDEX)
# What it depends on, of which that index has but a few versions.
	$(PIP) torch$(TORCH:%===%)
endif
	@touch $@

# The newest CPU build that pip knows of.
NEWEST_CPU_TORCH = $$($(BIN)/pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | head -n 1 | \
  cut -d+ -f1)

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.* csrc/cuda/*)
	$(PIP) -e '.[dev]'
# Triton's interpreter and compiler need no GPU. Without dependencies, and only where it is packaged.
	-$(PIP) --no-deps 'triton>=3.4'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.* csrc/cuda/*)
	$(if $(HAS_GPU),,FASTPREF_CUDA=0) $(PIP) -e '.[train]'
	@touch $@

demo: $(VENV)/.demo ## Train a small model and show what the fused head saves
	$(BIN)/fastpref demo

# One process per core, up to four; each test process computes with one thread, as a core has one to give.
# A worker keeps to its own end of the list, so fixtures of a module are seldom made twice.
TEST_PROCESSES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test: install ## Run all tests and print which lines of the package none of them reached
	FASTPREF_LINES=1 $(PYTEST) $(PYTEST_ARGS)

test-fast: install ## Run the tests without the marks slow and train: the core, in under 3 minutes
	$(PYTEST) -m 'not slow and not train' $(PYTEST_ARGS)

coverage: install ## Run all tests and print which lines and branches of the package none of them reached
	$(PYTEST) --cov --cov-branch --cov-report term:skip-covered $(PYTEST_ARGS)

# With the newest of everything, in an environment of its own that is made anew. The summary has what
# other libraries warn about; PYTEST_ARGS='-W error' makes that fail, too.
test-latest: ## Run all tests with the newest of everything, in .venv-latest
	rm -rf $(VENV)-latest
	$(MAKE) test VENV=$(VENV)-latest CONSTRAINTS= TORCH=

NATIVE := $(foreach folder,csrc csrc/cuda tests/support/cuda_emulate,$(wildcard $(addprefix $(folder)/*.,cpp h cu cuh)))

lint: install ## Check style, types, docs and versions: ruff, clang-format, mypy, mkdocs, pip-audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py
	$(MAKE) --no-print-directory docs

# Nothing is downloaded; a broken link is an error.
docs: install ## Build the pages of docs/ as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: install ## Format Python, C++ and CUDA in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: install ## Measure the head against its peers
	$(PIP) --no-deps triton liger-kernel cut-cross-entropy
	$(BIN)/python benchmarks/head.py

# Kills, disks that fail, generated cases, fuzzing, bad input, sanitizers and a soak, at whole length:
# half an hour. The figures go to benchmarks/results/reliability.json and to docs/reliability.md.
test-faults: install ## Run tests/faults at whole length and write docs/reliability.md
	-$(PIP) --no-deps atheris
	FASTPREF_FAULTS=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)
	$(BIN)/python benchmarks/tables.py

# The native tests once more, with sanitizers in fastpref._cpu and eight threads. ThreadSanitizer's
# memory has fixed places, which setarch keeps free.
sanitize: sanitize-address sanitize-thread ## Run the native tests with Address-, UB- and ThreadSanitizer
sanitize-address: SANITIZE := 1
sanitize-address: SANITIZED_ENV = FASTPREF_EXPECT_SANITIZED=asan ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
sanitize-thread: SANITIZE := thread
sanitize-thread: SANITIZED_ENV = FASTPREF_EXPECT_SANITIZED=tsan TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
  LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" setarch -R
sanitize-address sanitize-thread: SANITIZED = build/$@
sanitize-address sanitize-thread: install
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	FASTPREF_SANITIZE=$(SANITIZE) $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	cp -r fastpref $(SANITIZED)/package
	rm -f $(SANITIZED)/package/_cpu*.so
	cp $(SANITIZED)/fastpref/_cpu*.so $(SANITIZED)/package/
	rm -rf $(SANITIZED)/fastpref && mv $(SANITIZED)/package $(SANITIZED)/fastpref
	cd $(SANITIZED) && PYTHONPATH=$(abspath $(SANITIZED)) FASTPREF_TEST_THREADS=8 $(SANITIZED_ENV) $(abspath $(BIN))/pytest -c $(CURDIR)/pyproject.toml \
	  --rootdir $(CURDIR) -p no:cacheprovider -m 'not slow' -k 'not triton and not cuda' \
	  $(addprefix $(CURDIR)/tests/,backends/test_tile.py backends/test_native.py backends/test_native_product.py logps/test_logps.py losses/test_losses.py)

# The gpu-* targets are for a machine with a GPU: they use the torch and the triton of $(PYTHON), and
# download nothing. gpu-first takes 9 minutes at most, gpu-test and gpu-bench less than 8 each. What they
# take from the environment is in scripts/gpu.py.
gpu-first: ## Write what a GPU can tell in 9 minutes to OUT (PEERS: a folder of wheels)
	$(PYTHON) scripts/gpu_first.py $(if $(OUT),--out '$(OUT)') $(if $(PEERS),--peers '$(PEERS)')

gpu-install: ## Build the package for the GPU that is here
	$(PYTHON) scripts/gpu.py install

gpu-test: gpu-install ## Run the tests on the GPU, and compute-sanitizer
gpu-sanitize: gpu-install ## Run synccheck and initcheck on the GPU
gpu-profile: gpu-install ## Write what each kernel moves, and how long it takes, to benchmarks/results/ncu.csv
gpu-test gpu-sanitize gpu-profile: gpu-%:
	$(PYTHON) scripts/gpu.py $*

gpu-bench: gpu-install ## Measure the head against its peers on the GPU
	$(PYTHON) benchmarks/head.py --device cuda $(BENCH_ARGS)

clean: ## Remove what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache fastpref/_cpu*.so fastpref/_cuda*.so
	rm -rf $(VENV)/.installed $(VENV)/.demo $(VENV)-latest
