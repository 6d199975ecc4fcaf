"""Checksums of the activation store: HDF5's own, computed fast, and a cheaper one for our readers."""

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


SCHEMA_VERSION = 1
PAGE = 4096


def chunk_digest(raw: np.ndarray) -> int:
    """Checksum of bytes [n]: the CRC of the sums mod 2^64 of the 8-byte words of each 4 KiB page.

    Finds any error within one word, any lost, torn or misplaced page, and others but for 1 in 2^32; not words that swap
    within a page.
    """
    pages = raw.size // PAGE
    sums = np.add.reduce(raw[: pages * PAGE].view(np.uint64).reshape(pages, PAGE // 8), axis=1)  # [pages]
    return zlib.crc32(raw[pages * PAGE :].data, zlib.crc32(sums.data))


def fletcher32(raw: np.ndarray, size: int, scratch: np.ndarray) -> int:
    """HDF5's fletcher32 of the first `size` bytes of raw [pages * 4096], whose other bytes must be zero.

    Of the 16-bit words w_i, i < n: (sum w_i, sum (n - i) w_i) mod 65535, times 256 as HDF5 adds big-endian words and we
    little-endian.
    scratch: uint32 [2, 64, 1024]; with fresh temporaries page faults made this 5x slower.
    """
    words = raw.view(np.uint32).reshape(-1, PAGE // 4)  # [pages, 1024], each two 16-bit words: low, then high
    highs = total = pairs = 0
    columns = np.zeros(PAGE // 4, np.uint64)
    for page in range(0, len(words), scratch.shape[1]):
        block = words[page : page + scratch.shape[1]]
        high, low = scratch[:, : len(block)]
        np.right_shift(block, 16, out=high)
        np.bitwise_and(block, 0xFFFF, out=low)
        highs += int(np.add.reduce(high, axis=1, dtype=np.uint32).sum(dtype=np.uint64))
        high += low
        rows = np.add.reduce(high, axis=1, dtype=np.uint32).astype(np.uint64)
        total += int(rows.sum())
        pairs += PAGE // 4 * int(rows @ np.arange(page, page + len(block), dtype=np.uint64))
        columns += np.add.reduce(high, axis=0, dtype=np.uint32)
    pairs += int(columns @ np.arange(PAGE // 4, dtype=np.uint64))  # sum over uint32 j of j * (low_j + high_j)
    sums = 256 * total, 256 * ((size + 1) // 2 * total - 2 * pairs - highs)
    first, second = ((s - 1) % 65535 + 1 if s else 0 for s in sums)  # ones' complement: zero only if every word is
    return second << 16 | first


def crc(attributes: Mapping[str, bytes]) -> int:
    """CRC-32 of names and values of attributes, in the order of the names."""
    return zlib.crc32(b"\0".join(part for key in sorted(attributes) for part in (key.encode(), attributes[key])))
