"""What `convkernels bench` and the suites in benchmarks/ share: timing, peers, real text, figures.

Nothing here is imported by the package itself; matplotlib and rich are optional and imported where they are used.
"""
