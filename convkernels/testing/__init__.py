"""What the tests and the self-test of the package share: problems and their tensors (`inputs`, `attention`), random
ones (`random_problems`), exact results (`oracle`, `attention_oracle`), how far others may be from them (`accuracy`,
`bounds`, `compare`), traps for memory errors (`poison`) and recorded results (`golden`).

Nothing here is imported by the package itself. The oracles and `philox` are written apart from the kernels and from the
`reference` backend, so that an error would have to be made twice to go unseen.
"""
