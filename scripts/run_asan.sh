#!/bin/sh
# Runs Python tests over a CPU library, and over the CUDA kernels on the CPU, built with AddressSanitizer and
# UndefinedBehaviorSanitizer; any finding ends the run. The interpreter is not instrumented, so the run-time libraries
# are preloaded. The checkout's own build is left alone: the package and the tests are copied next to the instrumented
# libraries.
#   PYTHON=.venv/bin/python scripts/run_asan.sh [pytest arguments; the default is two selections that reach all kernels]
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cxx=${CXX:-g++}
build=build/asan
stage=$build/stage

torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
PATH=$(dirname "$python"):$PATH
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCK_SANITIZE=ON -DCK_SIMT=ON \
    -DCK_PYTHON=OFF -DCK_TORCH_DIR="$torch" -DCMAKE_CXX_COMPILER="$cxx" ${CMAKE_ARGS:-} >/dev/null
cmake --build "$build" --target all ck_tests

rm -rf "$stage"
mkdir -p "$stage"
cp -R convkernels tests pyproject.toml "$stage"
[ ! -d benchmarks ] || cp -R benchmarks "$stage"
rm -rf "$stage/convkernels/_native" "$stage"/convkernels/_C*.so
cmake --install "$build" --prefix "$stage/convkernels" >/dev/null

runtime() { realpath "$("$cxx" -print-file-name="$1")"; }
LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)"
# Leaks are not looked for: the interpreter and torch free little at exit.
ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=1
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export ASAN_OPTIONS UBSAN_OPTIONS
ctest --test-dir "$build" -j "${WORKERS:-2}" --output-on-failure --no-tests=error

cd "$stage"
export LD_PRELOAD
CONVKERNELS_SIMT=1 "$python" - <<'PYTHON'
import convkernels
reasons = convkernels.why_not("cpu") + convkernels.why_not("cuda")
assert not reasons, reasons
names = ("libconvkernels_cpu.so", "libconvkernels_simt.so")
loaded = {line.split()[-1] for line in open("/proc/self/maps") if line.strip().endswith(names)}
assert len(loaded) == 2 and all("/asan/" in path for path in loaded), f"expected instrumented libraries, got {loaded}"
PYTHON

run() {
    "$python" -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys -m "not gpu and not slow" --maxfail=1 \
        ${FULL:-} "$@"
}
if [ $# -gt 0 ]; then
    run "$@"
    exit
fi
set -- -n "${WORKERS:-2}" --dist worksteal -q
# The allocator keeps freed memory back to catch its use, so a test of memory growth means nothing here.
run "$@" tests/test_golden.py tests/test_fuzz.py tests/test_memory.py tests/test_decoding.py tests/test_equivalences.py \
    tests/test_instruction_sets.py tests/test_threads.py tests/test_attention_golden.py tests/test_attention_fuzz.py \
    tests/test_attention_blocks.py -k "not reference and not triton and not cuda and not does_not_grow"
export CONVKERNELS_SIMT=1
run "$@" tests/test_golden.py tests/test_fuzz.py tests/test_memory.py tests/test_decoding.py tests/test_attention_fuzz.py \
    tests/test_attention_fragments.py -k "cuda and not does_not_grow and not wide_problems" --every "${EVERY:-8}"
