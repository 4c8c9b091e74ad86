"""Philox4x32-10 in numpy (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the dropout mask
drawn from it.
"""

import numpy as np

MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter, key):
    """Four uint32 words per counter.

    counter: four uint32 arrays that broadcast together; key: two uint32 integers. Returns four arrays.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint32) for c in counter)
    k0, k1 = np.uint32(key[0]), np.uint32(key[1])
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS):
            p0 = c0.astype(np.uint64) * MULTIPLIER[0]
            p1 = c2.astype(np.uint64) * MULTIPLIER[1]
            c0, c1, c2, c3 = (
                (p1 >> HALF).astype(np.uint32) ^ c1 ^ k0,
                (p1 & LOW).astype(np.uint32),
                (p0 >> HALF).astype(np.uint32) ^ c3 ^ k1,
                (p0 & LOW).astype(np.uint32),
            )
            k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return np.broadcast_arrays(c0, c1, c2, c3)


def keep_mask(seed, probability, batch, length, heads, taps):
    """Which weight elements survive dropout: bool [batch, length, heads, taps].

    Counter (t, b, h, j // 4) under the key (low word, high word) of the 64-bit seed; tap j takes output word j % 4 and
    is kept when that word is at least floor(probability * 2**32). A weight shared over batch or time has batch or
    length 1 here.
    """
    if probability >= 1.0:
        return np.zeros((batch, length, heads, taps), dtype=bool)
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    blocks = (taps + 3) // 4
    words = philox4x32(
        (
            np.arange(length)[None, :, None, None],
            np.arange(batch)[:, None, None, None],
            np.arange(heads)[None, None, :, None],
            np.arange(blocks)[None, None, None, :],
        ),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    drawn = np.stack(words, axis=-1).reshape(batch, length, heads, 4 * blocks)[..., :taps]
    return drawn >= np.uint64(int(probability * 2.0**32))
