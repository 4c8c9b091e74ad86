"""What compiled kernels cost, without a GPU. `rules` and `budgets`: figures, and what they are held to. `triton` and
`nvcc`: how the figures of each backend's kernels are got. `instructions`, `control_flow` and `loops`: instructions of
main loops. `counters`: what launches move. `estimate`, `triton_estimate`, `triton_attention`: how long a GPU would take
at least."""
