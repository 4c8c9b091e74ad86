"""Inputs, oracle, error bounds, poisoning and golden tensors shared by the tests and the benchmarks.

Nothing here is imported by the package itself. `oracle` and `philox` are written in numpy, apart from the kernels and
from the `reference` backend, so that an error would have to be made twice to go unseen.
"""
