# Every target works as the first command in a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Where a machine without an NVIDIA GPU finds torch's CPU build, if pip does not know of one already.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: install demo test lint bench sanitize clean

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install --quiet torch==$(TORCH)
else
	$(BIN)/pip install --quiet 'torch==$(TORCH)+cpu' 2>/dev/null || \
	  $(BIN)/pip install --quiet torch==$(TORCH) --index-url $(TORCH_CPU_INDEX)
endif
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install --quiet -e '.[train]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/fastpref demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/pip install --quiet --no-deps triton liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(BIN)/python benchmarks/head.py

# The native tests once more, with AddressSanitizer and UndefinedBehaviorSanitizer in fastpref._cpu.
SANITIZED := build/sanitize
SANITIZED_ENV = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  PYTHONPATH=$(abspath $(SANITIZED)) FASTPREF_EXPECT_SANITIZED=1
sanitize: install
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	FASTPREF_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	cp -r fastpref $(SANITIZED)/package
	rm -f $(SANITIZED)/package/_cpu*.so
	cp $(SANITIZED)/fastpref/_cpu*.so $(SANITIZED)/package/
	rm -rf $(SANITIZED)/fastpref && mv $(SANITIZED)/package $(SANITIZED)/fastpref
	cd $(SANITIZED) && $(SANITIZED_ENV) $(abspath $(BIN))/pytest -c $(CURDIR)/pyproject.toml \
	  --rootdir $(CURDIR) -p no:cacheprovider -m 'not slow' \
	  $(addprefix $(CURDIR)/tests/,test_tile.py test_native.py test_logps.py test_losses.py)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache fastpref/_cpu*.so
	rm -f $(VENV)/.installed $(VENV)/.demo
