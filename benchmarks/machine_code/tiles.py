"""Which tiles of pairs of queries and keys the window of an attention crosses."""

from collections import Counter
from functools import cache

PART = 32  # keys of which a kernel decides at once
# Cases of backward_passes: tiles beside the window and those that it crosses; the last of each for terms of rank 16 and
# windows of more columns than are kept.
KEYS_NEAR = ("one part near", "one part near, rank 16")
QUERIES_NEAR = ("beside the window", "one part near", "near, rank 16")


@cache
def near_parts(
    length: int, rows: int, keys: int, block: int, window: tuple[int, int] | None, causal: bool, by_keys: bool = False
) -> Counter:
    """The tiles of rows x keys pairs that a head meets whose blocks have so many queries, by how many of their parts
    are near: the window, so far to the left and right, crosses them, or not all pairs are seen. by_keys: rows and
    blocks are of keys, which meet queries."""
    left, right = (window[::-1] if by_keys else window) if window is not None else (0, 0)
    found: Counter[int] = Counter()
    for i in range(0, length, rows):
        begin = i // block * block
        first, end = (begin, length) if by_keys else (0, min(length, begin + block))
        for j in range(first if causal else 0, end if causal else length, keys):
            near = 0
            for k in range(j, j + keys, PART):
                hidden = causal and (k < i + rows - 1 if by_keys else k + PART - 1 > i)
                crossed = window is not None and k + PART - 1 >= i - left and k - i - rows + 1 <= right
                near += hidden or crossed
            found[near] += 1
    return found


def backward_passes(by_keys: bool, others: int, length: int, window: tuple[int, int] | None, causal: bool) -> dict:
    """How often a head goes through the main loops of the backward passes by warpgroups, by their cases: 16 queries,
    or keys, of a warp and so many others at a time. A window that is longer than a tile of pairs has no sums beside
    it, and all of a tile of queries is near where some of it is."""
    tiles, wide = near_parts(length, 16, others, 128, window, causal, by_keys), window is not None and sum(window) > 64
    far = f"16 x {others} pairs"
    if by_keys:
        # What a near part takes besides is the same for each of them.
        parts = sum(near * count for near, count in tiles.items())
        return {far: tiles.total() - parts, f"{far}, {KEYS_NEAR[wide]}": parts}
    if wide:
        return {far: tiles[0], f"{far}, {QUERIES_NEAR[2]}": tiles.total() - tiles[0]}
    if window is None:
        return {far: tiles.total()}
    return {f"{far}, {QUERIES_NEAR[0]}": tiles[0], f"{far}, {QUERIES_NEAR[1]}": tiles[1] + tiles[2]}
