# Everything a person or CI runs. `make bench` and `make test` need nothing but this checkout, Python 3.11, a C++20
# compiler, CMake and make; they install the rest into .venv. The gpu-* targets use $(PYTHON) as it is.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
EXTRAS ?= bench,test,dev
RESULTS ?= results
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/native
NATIVE := convkernels/_native
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE_SOURCES))
PYTEST_FLAGS ?=
# A process that has nothing left to test takes half of what another still has.
PARALLEL := -n $(WORKERS) --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Some containers set it; then each of many processes compiles torch's Python files anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# One test process per core: more threads in each would only fight.
test test-fast asan interpreted simulated counters models-oldest: export OMP_NUM_THREADS = 1
# Without it Triton 3.9 warns at every compilation that a default will change.
test test-fast interpreted: export TRITON_DEFAULT_FP_FUSION = 1

.PHONY: help install build cpu simt-build counted-build bench bench-cpu test test-full test-fast lint format ctest abi asan interpreted simulated counters mutants cross hub-kernel \
        models-oldest \
        gpu-build gpu-run gpu-smoke gpu-test gpu-sanitize gpu-bench gpu-rehearsal rehearsed-steps clean
.NOTPARALLEL:

help:
	@echo "make install    create .venv with everything needed to run and test, and build in place"
	@echo "make cpu        compile the CPU kernels alone (simt-build: the simulated CUDA kernels), without nvcc"
	@echo "make bench      the main job: measure, write tables and plots to $(RESULTS)/"
	@echo "make bench-cpu  where this machine's CPU kernels stand to their goals: $(RESULTS)/cpu/, some minutes"
	@echo "make test       lint, C++ tests, library checks, sanitizers, all Python tests (what CI runs)"
	@echo "make test-full  the same with every case, for hours"
	@echo "make test-fast  the Python and C++ tests that are quick"
	@echo "make interpreted the tests of the triton backend in Triton's interpreter (EVERY=1: all of them, for hours)"
	@echo "make simulated  the tests of the cuda backend, its kernels simulated on the CPU"
	@echo "make counters   what the simulated kernels move, held to a budget"
	@echo "make models-oldest the tests of the models and the training scripts with the oldest packages that they work with"
	@echo "make lint|format|ctest|abi|asan|mutants|cross|clean"
	@echo "make hub-kernel the CPU kernels as a repository of the Hugging Face kernels library: build/hub/"
	@echo "make gpu-run    on a machine with a GPU, with PYTHON=<one that has torch>, no network needed: every check and figure"
	@echo "make gpu-smoke|gpu-test|gpu-sanitize|gpu-bench   parts of it"
	@echo "make gpu-rehearsal   all of it without a GPU, in the software of a machine that has one"

# Environment: each stamp depends on what would make it stale. Compiling all of torch's Python files ahead would take
# longer than a run needs; what is imported is compiled then.

$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: pyproject.toml setup.py $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-compile $$($(BIN)/python -c \
	    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	CONVKERNELS_BUILD=none $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

# Everything this machine has compilers for; the CUDA kernels need nvcc, and no GPU.
$(NATIVE)/.built: $(VENV)/.requirements $(NATIVE_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Without a GPU `make bench` waits for no CUDA kernels, unless this checkout has been built with them before.
$(NATIVE)/.cpu: $(VENV)/.requirements $(NATIVE_SOURCES)
	CONVKERNELS_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

RUNNABLE := $(NATIVE)/$(if $(wildcard $(NATIVE)/.built)$(shell nvidia-smi -L 2>/dev/null),.built,.cpu)

# One library alone, as fast as it can be had: nvcc is not started. ninja knows what is stale. The libraries: of the CPU
# kernels; of the CUDA kernels to run on a CPU; and of these counting what they move.
$(BUILD)/build.ninja:
	$(MAKE) $(NATIVE)/.cpu

cpu: LIBRARY = cpu
simt-build: LIBRARY = simt
counted-build: LIBRARY = counted
cpu simt-build counted-build: | $(BUILD)/build.ninja
	cmake --build $(BUILD) --target convkernels_$(LIBRARY)
	cmake --install $(BUILD) --prefix convkernels --component $(LIBRARY) >/dev/null

# The kernels for GPUs can be interpreted, and compiled ahead of time, on a machine without one. A torch for GPUs has
# brought its own Triton; for the others it is the version whose budget of registers is committed.
$(VENV)/.triton: $(VENV)/.requirements
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile "$(TRITON)"
	@touch $@

# The models, and what the tests of them and of drop-ins need.
$(VENV)/.hf: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --no-compile $$($(BIN)/python -c 'import tomllib; \
	    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	    print(*extras["hf"], *extras["test-hf"], *extras["onnx"], *extras["test-interop"])')
	@touch $@

# What the training scripts need beside the models.
$(VENV)/.train: $(VENV)/.hf
	$(BIN)/python -m pip install --quiet --no-compile $$($(BIN)/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["train"])')
	@touch $@

build: $(NATIVE)/.built

install: build $(VENV)/.triton $(VENV)/.train

# The main job

# Convolutions, attention, and training steps of the models of Tay et al. with two layers a stack: the last two with
# smaller batches and fewer lengths than by default, so that all of it takes three minutes.
bench: $(RUNNABLE) $(VENV)/.hf
	$(BIN)/python -m benchmarks bench --output $(RESULTS) --seconds 5 --compile-seconds 10
	$(BIN)/python -m benchmarks bench --output $(RESULTS) --suite attention --batch 1 --dtypes float32 \
	    --lengths 128,512 --seconds 0.1 --compile-seconds 0
	$(BIN)/python -m benchmarks bench --output $(RESULTS) --suite models --models seq2seq --layers 2 --tokens 512 \
	    --lengths 64,1024 --seconds 0.3
	@echo "Plots:" && find $(RESULTS) -name '*.png' | sort

# What the CPU kernels are to reach, by the best set of them that this processor has and by that for AVX2, in two threads.
bench-cpu: $(NATIVE)/$(if $(wildcard $(NATIVE)/.built),.built,.cpu)
	$(BIN)/python -m benchmarks.bench_cpu --output $(RESULTS)/cpu

# Checks

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

ctest: build
	cmake $(CMAKE_ARGS) $(BUILD) >/dev/null
	cmake --build $(BUILD) --target ck_tests
	ctest --test-dir $(BUILD) -j $(WORKERS) --output-on-failure --no-tests=error

abi: build
	$(BIN)/python scripts/check_abi.py $(NATIVE)/libconvkernels_c*.so
	$(BIN)/python scripts/check_headers.py

# All random problems on the CPU, one in SANITIZED_EVERY of the cases of the CUDA kernels.
SANITIZED_EVERY ?= 8
asan: install
	PYTHON=$(BIN)/python WORKERS=$(WORKERS) EVERY=$(SANITIZED_EVERY) FULL=$(FULL) scripts/run_asan.sh

# Seeds faults in the kernels and shows that the tests catch each; several minutes, so not part of `make test`.
mutants: install
	$(BIN)/python scripts/mutations.py --backend cpu
	$(BIN)/python scripts/mutations.py --backend cuda

# The tests of the triton backend in Triton's interpreter: all recorded results of attention, and of each other test's
# cases, which have all sizes, one in EVERY.
EVERY ?= 48
interpreted: export TRITON_INTERPRET = 1
interpreted: install
	$(BIN)/python -m pytest $(PARALLEL) -k triton tests/test_attention_golden.py $(PYTEST_FLAGS)
	$(BIN)/python -m pytest $(PARALLEL) -k triton -m "not slow" --every $(EVERY) --ignore tests/test_attention_golden.py \
	    $(PYTEST_FLAGS)

# The tests of the cuda backend, its kernels on this CPU: all recorded results, one in SIMULATED_EVERY of each other
# test's cases, those of attention once more on a GPU of compute capability 8.0, since 9.0 has kernels of its own,
# and random problems with the threads of a block in four other orders, on GPUs of 9.0 and 8.0, and with as little shared
# memory as 8.6 and 12.0 have.
SIMULATED_EVERY ?= 6
TILED := $(foreach name,fuzz fragments hidden tiles blocks gradients equivalences,tests/test_attention_$(name).py)
simulated: export CONVKERNELS_SIMT = 1
simulated: install simt-build
	$(BIN)/python -m pytest $(PARALLEL) -k cuda tests/test_golden.py tests/test_attention_golden.py $(PYTEST_FLAGS)
	$(BIN)/python -m pytest $(PARALLEL) -k cuda -m "not slow and not gpu" --every $(SIMULATED_EVERY) \
	    --ignore tests/test_golden.py --ignore tests/test_attention_golden.py $(PYTEST_FLAGS)
	CONVKERNELS_SIMT_ARCH=80 $(BIN)/python -m pytest $(PARALLEL) -k cuda tests/test_attention_golden.py $(PYTEST_FLAGS)
	CONVKERNELS_SIMT_ARCH=80 $(BIN)/python -m pytest $(PARALLEL) -k cuda -m "not slow and not gpu" \
	    --every $(SIMULATED_EVERY) $(TILED) $(PYTEST_FLAGS)
	printf 'CONVKERNELS_SIMT_SEED=%s CONVKERNELS_SIMT_ARCH=%s CONVKERNELS_SIMT_SHARED=%s\n' \
	    1 90 232448 2 80 166912 3 86 101376 4 120 101376 | \
	    xargs -P $(WORKERS) -L 1 sh -c 'env "$$@" $(BIN)/python -m pytest -q -k "cuda and (wide or rows_quick)" tests/test_fuzz.py \
	    tests/test_attention_fragments.py $(PYTEST_FLAGS)' sh

# What launches on small problems move, held to tests/launch_budget.txt; scripts/launch_counters.py --update writes it anew.
counters: install counted-build
	$(BIN)/python scripts/launch_counters.py

# The full run comes last, so that its summary closes the output.
test: lint install ctest abi asan interpreted simulated counters
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_FLAGS)

# With all cases of the tests marked thin, and more of those of the kernels for GPUs.
test-full:
	$(MAKE) test CMAKE_ARGS="$(CMAKE_ARGS) -DCK_WIDE=ON" EVERY=12 SIMULATED_EVERY=1 SANITIZED_EVERY=2 FULL=--full \
	    PYTEST_FLAGS="--full $(PYTEST_FLAGS)"

test-fast: install ctest
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(PYTEST_FLAGS)

# The models and the training scripts with the oldest packages that pyproject.toml allows them, in an environment that
# has all else, torch and this checkout too, from $(VENV).
OLDEST := .venv-oldest
$(OLDEST)/.packages: pyproject.toml $(VENV)/.train
	$(BIN)/python -m venv --clear $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	$(OLDEST)/bin/python -m pip install --quiet --no-compile $$($(BIN)/python -c 'import re, tomllib; \
	    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	    print(*(re.sub(">=([^,]+).*", r"==\1", one) for name in ("hf", "train") for one in extras[name]))')
	@touch $@

models-oldest: install $(OLDEST)/.packages
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -m "not slow" $(wildcard tests/test_models*.py tests/test_training*.py) \
	    $(wildcard tests/test_interop_optimize*.py tests/test_interop_relative*.py) tests/test_study.py tests/test_examples_visualize.py $(PYTEST_FLAGS)

hub-kernel: $(NATIVE)/.cpu
	$(BIN)/python scripts/hub_kernel.py build/hub

# Compiles the kernels and their tests for 64-bit Arm where such a compiler is installed, and runs them where an emulator is.
cross:
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "cross: aarch64-linux-gnu-g++ is not installed" >&2; exit 1; }
	cmake -S . -B build/cross -G "Unix Makefiles" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_SYSTEM_NAME=Linux \
	    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCK_TORCH=OFF -DCK_PYTHON=OFF \
	    "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	cmake --build build/cross --target ck_cpu ck_tests
	if command -v qemu-aarch64 >/dev/null; then ctest --test-dir build/cross --output-on-failure; fi

# On a machine with a GPU: no network, no .venv, only what $(PYTHON) has

# With line numbers, for what compute-sanitizer and Nsight Compute say. A shell without a login may lack the toolkit's
# folder in PATH.
gpu-build:
	PATH="$$PATH:/usr/local/cuda/bin" CONVKERNELS_BUILD=cuda CMAKE_ARGS="-DCMAKE_CUDA_FLAGS=-lineinfo $(CMAKE_ARGS)" $(PYTHON) scripts/build_native.py

# The steps of scripts/gpu_run.py, which go on where one goes wrong: all, or some. What they leave is in build/gpu.
gpu-run: gpu-build
	$(PYTHON) scripts/gpu_run.py

gpu-smoke gpu-test gpu-sanitize gpu-bench: gpu-build
	$(PYTHON) scripts/gpu_run.py --again $(addprefix --only ,$(STEPS))

gpu-smoke: STEPS = environment smoke
gpu-test: STEPS = smoke tests
gpu-sanitize: STEPS = check
gpu-bench: STEPS = streaming attention sweep counters

# The same steps where there is no GPU, in the software that a machine with one has, the kernels simulated: in a copy of
# the checkout, which is built there, for one architecture, so that nothing of the usual build is touched. The NumPy is
# one that the interpreter of this torch's Triton works with. STEPS="smoke sweep": only these.
GPU_PYTHON ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
GPU_PACKAGES := torch==2.11.0 transformers==5.17.0 "numpy<2.4"
GPU_VENV := .venv-gpu
REHEARSAL := build/rehearsal
REHEARSED := $(CURDIR)/$(GPU_VENV)/bin/python

# What is mistyped is told before anything is installed.
rehearsed-steps:
	@$(GPU_PYTHON) scripts/gpu_run.py --list $(addprefix --only ,$(STEPS)) >/dev/null
	@echo "rehearsing with $$($(GPU_PYTHON) --version); GPU_PYTHON=... takes another"

$(GPU_VENV)/.packages: pyproject.toml
	$(GPU_PYTHON) -m venv --clear $(GPU_VENV)
	$(REHEARSED) -m pip install --quiet --no-compile $(GPU_PACKAGES) $$($(REHEARSED) -c 'import tomllib; \
	    content = tomllib.load(open("pyproject.toml", "rb")); extras = content["project"]["optional-dependencies"]; \
	    print(*content["build-system"]["requires"], *(r for e in ("bench", "hf", "test-hf", "test") for r in extras[e]))')
	@touch $@

gpu-rehearsal: rehearsed-steps $(GPU_VENV)/.packages
	mkdir -p $(REHEARSAL)
	find $(REHEARSAL) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --preserve=timestamps -t $(REHEARSAL)
	CMAKE_ARGS="-DCK_CUDA_ARCHITECTURES=90a-real $(CMAKE_ARGS)" $(MAKE) -C $(REHEARSAL) gpu-build PYTHON=$(REHEARSED)
	cmake --build $(REHEARSAL)/build/native --target convkernels_simt
	cmake --install $(REHEARSAL)/build/native --prefix $(REHEARSAL)/convkernels --component simt >/dev/null
	cd $(REHEARSAL) && $(REHEARSED) -m pytest -q tests/test_packaging.py -k registers_its_operators
	cd $(REHEARSAL) && $(REHEARSED) scripts/gpu_run.py --again --device cpu --workers $(WORKERS) \
	    --output $(CURDIR)/build/gpu-rehearsal $(addprefix --only ,$(STEPS))

clean:
	rm -rf build dist $(VENV) $(OLDEST) $(GPU_VENV) $(RESULTS) $(NATIVE) convkernels/_C*.so *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
