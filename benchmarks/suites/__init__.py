"""What `python -m benchmarks bench --suite NAME` measures, a module each."""
