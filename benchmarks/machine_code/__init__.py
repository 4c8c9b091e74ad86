"""What compiled kernels cost, without a GPU. `rules` and `budgets`: figures, and what they are held to. `triton` and
`nvcc`: how the figures of each backend's kernels are got. `control_flow` and `loops`: instructions of main loops.
`counters`: what launches move."""
