"""What results must meet, by dtype; docs/semantics.md has the same table and says why."""

import torch

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of the a-priori bounds of each element: convolutions of any size, attention on small tensors."""

NORM_LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Attention on large tensors: the norm of a result's error, as a share of the norm of the result."""

ELEMENT_LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""The same for the largest error, as a share of the largest element, on tensors that are not random problems."""
