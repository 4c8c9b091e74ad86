"""What the operators share: names of dtypes, the type that the reference computes in, and its dropout masks."""

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(dropout: float, training: bool, seed: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """Dropout and seed as operators take them: where there is dropout, a seed is drawn if none is given."""
    if not training or dropout == 0:
        return 0.0, None
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return float(dropout), seed


# Philox4x32-10 (Salmon et al. 2011), on int64 tensors that hold 32-bit words.
_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product; int64 wraps around, which leaves exactly those bits in place."""
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox_uniform_bits(seed: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """32 random bits (as int64) for every coordinate (b,t,h,j) of ``shape``, a function of seed and coordinate alone.

    Key: the low and high word of ``seed`` (int64 [1]). Counter: (t, b, h, j >> 2); element j takes output word j & 3.
    """
    b, t, h, j = (
        torch.arange(size, device=seed.device, dtype=torch.int64).view([-1 if i == axis else 1 for i in range(4)])
        for axis, size in enumerate(shape)
    )
    c0, c1, c2, c3 = t, b, h, j >> 2
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    word = (j & 3).expand(shape)
    return torch.stack([c.expand(shape) for c in (c0, c1, c2, c3)]).gather(0, word[None])[0]


def dropout_mask(
    seed: Tensor, p: float, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multipliers 0 or 1/(1-p) for weights of ``shape`` [B|1, T|1, H, K]; p=1 drops everything."""
    keep = philox_uniform_bits(seed, shape) >= int(p * 2**32)
    return keep.to(dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0)
