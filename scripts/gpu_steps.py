"""The steps of gpu_run.py, most valuable first within each part."""

from dataclasses import dataclass, field

SLOWER = 10  # factor of all time limits in a rehearsal


@dataclass(frozen=True)
class Step:
    """command: for the shell, with words of `words_for` in braces. It has to write to {results}."""

    name: str
    part: int
    seconds: float
    command: str
    environment: dict[str, str] = field(default_factory=dict)


# Arguments that say how much is done: on a GPU, and in a rehearsal, which also checks for tensors on the wrong device.
AMOUNTS = {
    "slower": ("1", str(SLOWER)),
    "tests": ("", "--second-device --every 12"),
    "slow_tests": ("", "--every 12"),
    "triton_tests": ("--every 24", "--every 192"),  # each case is a kernel to compile
    "checked": ("", "--only reduce"),
    "streamed": ("--seconds 0.4", "--seconds 0.01 --batch 1 --lengths 32"),
    "attended": (
        "--seconds 1 --batch 8 --lengths 512,2048,4096",
        "--seconds 0.01 --batch 1 --lengths 64 --channels 64 --heads 1",
    ),
    "swept": ("", "--seconds 1 --compile-seconds 5 --max-length 128 --dtypes bfloat16"),
}
PYTEST = (
    "{python} -m pytest -q -p no:cacheprovider --timeout=$((120 * {slower})) --timeout-method=thread -rfEs --tb=short "
    "--junitxml {result}.xml --max-worker-restart 1000"
)
BENCH = "{python} -m benchmarks bench --device {device} --overwrite --output {results}"
STREAMING = BENCH + " --suite streaming {streamed}"
ATTENTION = BENCH + " --suite attention --dtypes bfloat16 {attended}"
ONE_GPU_TEST = " --timeout=$((60 * {slower}))"
SMOKE = "{python} scripts/gpu_smoke.py --device {device} --jobs {workers} --json {result}.jsonl"
# Without torch's memory pool, so that an access past the end of a tensor is an error. Only the kernels of this project
# are watched, except by initcheck: it has to see all writes, and needs memory that CONVKERNELS_POISON has not filled.
UNDER = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 " + SMOKE + " {checked} --timeout $((100 * {slower})) --expect 'SUMMARY: 0 ' "
    "--under 'compute-sanitizer --error-exitcode 1 --tool "
)
OURS = " --kernel-name kns=ck'"
STEPS = (
    Step(
        "environment",
        1,
        40,
        "set -o pipefail; (git describe --always --dirty; nvidia-smi; nvcc --version; "
        "{python} -m convkernels.cli info && "
        '{python} -c \'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__, '
        'torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")\') 2>&1 | tee {result}.txt',
    ),
    Step("smoke", 1, 90, SMOKE + " --timeout $((40 * {slower}))"),
    Step("gpu tests cuda", 1, 90, PYTEST + ONE_GPU_TEST + " tests/test_gpu.py -k cuda --require cuda -n 4"),
    Step("streaming cuda", 1, 90, STREAMING + " --backend cuda --compile-seconds 0"),
    Step("attention cuda", 1, 120, ATTENTION + " --backend cuda --compile-seconds 0"),
    Step("counters cuda", 1, 150, "{python} scripts/gpu_counters.py --device {device} --timeout 30 --output {results}"),
    Step("cuda tests", 1, 240, PYTEST + " -k cuda --require cuda -m 'not gpu and not slow' -n {workers} {tests}"),
    Step("streaming triton", 2, 120, STREAMING + " --backend triton"),
    Step("attention triton", 2, 180, ATTENTION + " --backend triton"),
    Step(
        "gpu tests triton", 2, 120, PYTEST + ONE_GPU_TEST + " tests/test_gpu.py -k triton --require triton -n {workers}"
    ),
    Step(
        "triton tests",
        2,
        240,
        PYTEST + " -k triton --require triton -m 'not gpu and not slow' -n {workers} {triton_tests}",
    ),
    Step("memcheck", 3, 120, UNDER + "memcheck --report-api-errors no" + OURS),
    Step("racecheck", 3, 120, UNDER + "racecheck" + OURS),
    Step("synccheck", 3, 120, UNDER + "synccheck" + OURS),
    Step("initcheck", 3, 120, "CONVKERNELS_POISON=0 " + UNDER + "initcheck'"),
    Step("sweep", 3, 120, BENCH + " {swept}"),
    Step("slow cuda tests", 3, 300, PYTEST + " -k cuda --require cuda -m 'slow and not gpu' -n {workers} {slow_tests}"),
)


def file_of(step: Step) -> str:
    """The stem of the names of a step's log and results."""
    return step.name.replace(" ", "-")
