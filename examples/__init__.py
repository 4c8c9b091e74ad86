"""Programs for users. A package so that the benchmarks can have the batches that the training scripts train on."""
