#!/bin/sh
# Runs Python tests over a CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer; any finding ends the
# run. The interpreter is not instrumented, so the run-time libraries are preloaded. The checkout's own build is left
# alone: the package and the tests are copied next to the instrumented libraries.
#   PYTHON=.venv/bin/python scripts/run_asan.sh [pytest arguments; the default is a selection that reaches all kernels]
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cxx=${CXX:-g++}
build=build/asan
stage=$build/stage

torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
pybind11=$("$python" -c 'import importlib.util as u; print(u.find_spec("pybind11").submodule_search_locations[0])')
PATH=$(dirname "$python"):$PATH
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCK_SANITIZE=ON -DCK_TORCH_DIR="$torch" \
    -Dpybind11_DIR="$pybind11/share/cmake/pybind11" -DPython_EXECUTABLE="$python" -DCMAKE_CXX_COMPILER="$cxx" >/dev/null
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
ctest --test-dir "$build" --output-on-failure --no-tests=error

cd "$stage"
export LD_PRELOAD
"$python" - <<'PYTHON'
import convkernels, torch
from pathlib import Path
torch.ops.load_library(str(Path(convkernels.__file__).parent / "_native" / "libconvkernels_cpu.so"))
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libconvkernels_cpu" in line}
assert len(loaded) == 1 and "/asan/" in loaded.pop(), f"expected the instrumented library, got {loaded}"
PYTHON
if [ $# -eq 0 ]; then
    # The allocator keeps freed memory back to catch its use, so a test of memory growth means nothing here.
    set -- tests/test_golden.py tests/test_fuzz.py tests/test_memory.py tests/test_decoding.py tests/test_equivalences.py \
        tests/test_instruction_sets.py tests/test_threads.py -k "not reference and not does_not_grow" -n "${WORKERS:-2}" -q
fi
exec "$python" -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys -m "not gpu and not slow" --maxfail=1 "$@"
