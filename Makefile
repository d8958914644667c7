# What a developer runs: `make test`, `make demo`, `make bench`, `make reliability`. Everything made lies in build/, .venv/ and .venv-oldest/.

PYTHON ?= python3
JOBS ?= $(shell nproc)
# The promise of the wheel's tag. A test compares it with what the library needs; building on an older distribution
# allows an older one.
MANYLINUX := 2_34

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
HEADERS := $(CURDIR)/build/onnxruntime-headers

PYTHON_SOURCES := $(shell find src ops graph_passes models -type f -name '*.py' -o -name py.typed)
CPP_SOURCES := $(shell find cpp cmake -type f) CMakeLists.txt pyproject.toml README.md LICENSE
CPP_TESTS := $(shell find tests/cpp tests/amx_emulator -type f)
FORMATTED := $(shell find cpp tests/cpp tests/amx_emulator examples benchmarks -name '*.cc' -o -name '*.h' -o -name '*.c')

.DELETE_ON_ERROR:
.PHONY: build demo quality tinylm test test-all test-cpp test-amx-emulated test-sanitizers test-threads test-python test-oldest reliability lint format bench wheel clean distclean

build: $(VENV)/.installed

demo: build
	$(BIN)/python -m sparamx_onnx.models.demo

test: lint test-cpp test-amx-emulated test-sanitizers test-python

test-all: export SPARAMX_TEST_FULL = 1
test-all: lint test-cpp test-amx-emulated test-sanitizers test-threads test-python test-oldest

# Each goes on from the JSON it finds; the full runs, and those beside other engines, are in docs/performance.md.
bench: build
	$(BIN)/python benchmarks/kernels.py --quick --json build/benchmarks/kernels.json
	$(BIN)/python benchmarks/models.py --json build/benchmarks/models.json
	$(BIN)/python benchmarks/attention.py --json build/benchmarks/attention.json
	$(BIN)/python benchmarks/siblings.py --json build/benchmarks/siblings.json
	for what in overhead packing memory; do $(BIN)/python benchmarks/$$what.py --json build/benchmarks/$$what.json || exit; done

# What pruning does to models, about an hour; goes on from what benchmarks/measured/decoder_quality.json has. Then tables and
# charts of docs/ from everything in benchmarks/measured/.
quality: build
	$(BIN)/python benchmarks/quality.py --json benchmarks/measured/quality.json
	OPENBLAS_NUM_THREADS=1 $(BIN)/python benchmarks/decoder_quality.py --json benchmarks/measured/decoder_quality.json
	$(BIN)/python benchmarks/page.py

# Damage, interruptions and an hour of everything at once, in the numbers of docs/reliability.md: two hours on one core.
reliability: build/asan/build.ninja $(VENV)/.installed
	cmake --build build/asan --parallel $(JOBS)
	SPARAMX_TEST_COUNT=100000 build/asan/tests/cpp/sparamx_tests --gtest_filter='*.Damaged*'
	SPARAMX_TEST_COUNT=2000 $(BIN)/python -m pytest -rP tests/cli/test_mutations.py
	SPARAMX_TEST_COUNT=200 $(BIN)/python -m pytest -rP tests/cli/test_interruption.py -k any_moment
	$(BIN)/python benchmarks/soak.py --minutes 60 --json build/benchmarks/soak.json

# Trains the decoder of models/tinylm/checkpoint anew, about 15 minutes of one core; SPARAMX_TINYLM=build/tinylm uses it.
tinylm: build/tinylm/training.json

wheel: build/wheel/.built

# --- What the machine must have -----------------------------------------------------------------------------------------

# TOOL=PACKAGE: a command or a file, and the Debian package that brings it.
TOOLS := cmake=cmake ninja=ninja-build g++=g++ qemu-x86_64-static=qemu-user-static \
         /usr/include/gtest/gtest.h=libgtest-dev

build/.tools: Makefile
	@mkdir -p build
	@missing=""; \
	for pair in $(TOOLS); do \
	  tool=$${pair%%=*}; \
	  if ! command -v "$$tool" >/dev/null 2>&1 && [ ! -f "$$tool" ]; then missing="$$missing $${pair#*=}"; fi; \
	done; \
	if ! $(PYTHON) -c 'import ensurepip' >/dev/null 2>&1; then missing="$$missing python3-venv"; fi; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -q && apt-get install -q -y --no-install-recommends $$missing; \
	  else \
	    echo "Some tools are missing. On Debian this installs them: sudo apt-get install$$missing" >&2; exit 1; \
	  fi; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@touch $@

# --- Python: one environment with the newest of everything, one with the oldest that is supported -----------------------

$(VENV)/.ready: tests/requirements.txt build/.tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

$(OLDEST)/.ready: tests/requirements-oldest.txt build/.tools
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements-oldest.txt
	@touch $@

# Tests run what a user would install: the wheel, never the sources in the checkout.
build/wheel/.built: $(VENV)/.ready $(PYTHON_SOURCES) $(CPP_SOURCES)
	rm -rf build/wheel
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  -C build-dir=build/python -C cmake.define.SPARAMX_WERROR=ON -C cmake.define.SPARAMX_ORT_DOWNLOAD_DIR=$(HEADERS) \
	  -w build/wheel .
	$(BIN)/wheel tags --remove --platform-tag manylinux_$(MANYLINUX)_x86_64 build/wheel/*.whl
	@touch $@

# mypy does not see that a package which it remembers has got another module, so its memory goes.
$(VENV)/.installed: build/wheel/.built
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	@rm -rf .mypy_cache
	@touch $@

$(OLDEST)/.installed: build/wheel/.built $(OLDEST)/.ready
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	@touch $@

build/tinylm/training.json: models/tinylm/train.py models/tinylm/text.py | $(VENV)/.installed
	$(BIN)/python -m sparamx_onnx.models.tinylm.train build/tinylm

test-python: $(VENV)/.installed $(OLDEST)/.installed
	SPARAMX_OLDEST_PYTHON=$(CURDIR)/$(OLDEST)/bin/python $(BIN)/python -m pytest

# `test-python` runs a few sessions there; this runs everything that needs no torch, except tests made of what the oldest
# onnx and onnxruntime do not have in this form (the cases of ONNX's own node tests, the quantizer to 4 bits), and damaged
# models, of which that onnxruntime dies by itself. The long matrices are run with the newest versions only.
NOT_THERE := graph_passes/test_attention_node_tests graph_passes/test_node_tests graph_passes/test_quantized cli/test_mutations
# Single tests for the same reason: weights of float8 and int4 made by onnx, and newer inputs of GroupQueryAttention.
NOT_THERE_EITHER := test_fold_constants.py::test_external_tensors_of_half_bytes \
                    test_linear_layers.py::test_what_becomes_of_odd_products \
                    test_rewrite_attention.py::test_a_converted_decoder_goes_on_like_the_original \
                    test_rewrite_attention.py::test_a_shared_buffer_stays_one
test-oldest: $(OLDEST)/.installed
	SPARAMX_TEST_FULL= $(OLDEST)/bin/python -m pytest $(NOT_THERE:%=--ignore=tests/%.py) \
	  $(NOT_THERE_EITHER:%=--deselect=tests/graph_passes/%) \
	  tests/cli tests/graph_passes tests/ops tests/packaging/test_versions.py tests/session

# --- C++ ------------------------------------------------------------------------------------------------------------------

build/release/build.ninja: CMakeLists.txt tests/cpp/CMakeLists.txt tests/amx_emulator/CMakeLists.txt build/.tools
	cmake -G Ninja -S . -B build/release -DSPARAMX_BUILD_TESTS=ON -DSPARAMX_ORT_DOWNLOAD_DIR=$(HEADERS) \
	  -DSPARAMX_MAX_GLIBC=$(subst _,.,$(MANYLINUX))

build/asan/build.ninja: CMakeLists.txt tests/cpp/CMakeLists.txt build/.tools
	cmake -G Ninja -S . -B build/asan -DSPARAMX_BUILD_TESTS=ON -DSPARAMX_BUILD_PLUGIN=OFF -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS=-O1 -DSPARAMX_SANITIZE=address,undefined

build/tsan/build.ninja: CMakeLists.txt tests/cpp/CMakeLists.txt build/.tools
	cmake -G Ninja -S . -B build/tsan -DSPARAMX_BUILD_TESTS=ON -DSPARAMX_BUILD_PLUGIN=OFF -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS=-O1 -DSPARAMX_SANITIZE=thread

test-cpp: build/release/build.ninja
	cmake --build build/release --parallel $(JOBS)
	ctest --test-dir build/release --output-on-failure --parallel $(JOBS) --exclude-regex '^AmxEmulated'

# The AMX kernels on a CPU that has AMX or not: tests/amx_emulator executes their instructions.
test-amx-emulated: build/release/build.ninja $(VENV)/.installed
	cmake --build build/release --parallel $(JOBS)
	ctest --test-dir build/release --output-on-failure --parallel $(JOBS) --tests-regex '^AmxEmulated'
	SPARAMX_TEST_LEVEL=amx LD_PRELOAD=$(CURDIR)/build/release/tests/amx_emulator/libamx_emulator.so \
	  $(BIN)/python -m pytest tests/ops tests/models/test_llama.py \
	  tests/models/test_minilm.py::test_bf16_weights_give_nearly_the_same_embeddings

test-sanitizers: build/asan/build.ninja
	cmake --build build/asan --parallel $(JOBS)
	ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  ctest --test-dir build/asan --output-on-failure --parallel $(JOBS)

test-threads: build/tsan/build.ninja
	cmake --build build/tsan --parallel $(JOBS)
	TSAN_OPTIONS=halt_on_error=1 ctest --test-dir build/tsan --output-on-failure

# --- Style and types ------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy -p sparamx_onnx
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed $(OLDEST)/.installed

distclean: clean
	rm -rf $(VENV) $(OLDEST)
