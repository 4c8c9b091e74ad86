"""Which tiles of pairs of queries and keys the window of an attention crosses."""

from collections import Counter
from functools import cache

PART = 32  # keys of which a kernel decides at once


@cache
def near_parts(length: int, rows: int, keys: int, block: int, window: tuple[int, int] | None, causal: bool) -> Counter:
    """The tiles of rows x keys pairs that a head meets whose blocks have so many queries, by how many of their parts
    are near: the window, so far to the left and right, crosses them, or not all pairs are seen."""
    found: Counter[int] = Counter()
    for i in range(0, length, rows):
        for j in range(0, min(length, i // block * block + block) if causal else length, keys):
            near = 0
            for k in range(j, j + keys, PART):
                hidden = causal and k + PART - 1 > i
                crossed = window is not None and k + PART - 1 >= i - window[0] and k - i - rows + 1 <= window[1]
                near += hidden or crossed
            found[near] += 1
    return found
