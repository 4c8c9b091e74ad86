"""Measurements of convkernels: `python -m benchmarks` times, `python -m benchmarks.machine_code` reads what compiled
kernels cost. A checkout or a source distribution holds them; they are not installed.

Imports nothing when it is imported, and nothing in `convkernels` imports it but the command line.
"""
