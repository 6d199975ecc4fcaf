"""Throughput of the activation store against np.memmap on the same float32 rows.

    python kernels/bench/bench_cache.py --mb 96 --rows 32768

Both write the same batches and end in fsync (memmap: flush, then fsync). Reads are of the same batches into fresh arrays: `warm` from the
page cache, `cold` after the file's pages were dropped from it. `shuffled` is compared with a memmap read of the same blocks, in memory
order. Ours and memmap alternate; the table gives medians. Timings depend on the disk: look at the ratio.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from oacore.cache import Reader, Writer

BATCH = 1024


def sync(path: Path, drop: bool = False) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    if drop:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def bench(data: np.ndarray, folder: Path, repeats: int) -> list[tuple[str, float, float]]:
    """Rows of (operation, our MB/s, memmap MB/s). data: [rows, width]."""
    ours, theirs = folder / "ours.h5", folder / "theirs.bin"

    def write_ours() -> None:
        with Writer(ours, {}) as writer:
            for start in range(0, len(data), BATCH):
                writer.append("x", data[start : start + BATCH])

    def write_theirs() -> None:
        theirs.unlink(missing_ok=True)  # ours writes a new file too
        memmap = np.memmap(theirs, data.dtype, "w+", shape=data.shape)
        for start in range(0, len(data), BATCH):
            memmap[start : start + BATCH] = data[start : start + BATCH]
        memmap.flush()
        sync(theirs)

    def read_ours() -> None:
        with Reader(ours) as reader:
            for _ in reader.batches("x", BATCH):
                pass

    def read_theirs() -> None:
        memmap = np.memmap(theirs, data.dtype, "r", shape=data.shape)
        for start in range(0, len(data), BATCH):
            _ = np.array(memmap[start : start + BATCH])  # held while the next is read, as a consumer does

    def shuffle_ours() -> None:
        with Reader(ours) as reader:
            for _ in reader.shuffled("x", BATCH, seed=0):
                pass

    def shuffle_theirs() -> None:
        memmap = np.memmap(theirs, data.dtype, "r", shape=data.shape)
        for start in np.random.default_rng(0).permutation(np.arange(0, len(data), BATCH)):
            _ = np.array(memmap[start : start + BATCH])  # held while the next is read, as a consumer does

    def timed(task: Callable[[], None], path: Path, cold: bool) -> float:
        if cold:
            sync(path, drop=True)
        start = time.perf_counter()
        task()
        return data.nbytes / 1e6 / (time.perf_counter() - start)

    table = []
    for name, mine, other, cold in (
        ("write + fsync", write_ours, write_theirs, False),
        ("read warm", read_ours, read_theirs, False),
        ("read cold", read_ours, read_theirs, True),
        ("shuffled warm", shuffle_ours, shuffle_theirs, False),
        ("shuffled cold", shuffle_ours, shuffle_theirs, True),
    ):
        pairs = [(timed(mine, ours, cold), timed(other, theirs, cold)) for _ in range(repeats + 1)][1:]  # the first warms up
        table.append((name, median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=96, help="size of the data, MB")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    data = np.random.default_rng(0).standard_normal((args.rows, max(1, args.mb * 250_000 // args.rows)), dtype=np.float32)
    print(f"{args.rows} rows x {data.shape[1]} float32 = {data.nbytes / 1e6:.0f} MB, batches of {BATCH}, median of {args.repeats}, MB/s")
    print(f"{'':14} {'ours':>8} {'memmap':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, mine, other in bench(data, Path(folder), args.repeats):
            print(f"{name:14} {mine:8.0f} {other:8.0f} {mine / other:6.2f}")


if __name__ == "__main__":
    main()
