"""What `python -m benchmarks bench --suite NAME` measures, a module each, and the names that they share."""

OURS, COPY = "convkernels", "copy"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
MODES = NO_GRAD, RECORDING = "no-grad", "recording"  # of a call
