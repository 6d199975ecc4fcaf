"""Throughput of the activation store beside np.memmap and plain h5py with fletcher32, on the same float32 rows.

    python tests/bench/bench_cache.py --mb 96 --rows 32768

All write the same batches of 1024 rows to a new file and fsync it (memmap: flush, then fsync), and read them into fresh
arrays: `warm` from the page cache, `cold` after the file's pages were dropped from it. The contestants take turns; MB/s
are medians, and the ratio is the median over turns of ours to memmap, so that a change of the machine's load hits both.
`shuffled`: no contestant shuffles, so memmap and h5py read their batches in random order, unmixed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from oacore.store.reader import Reader
from oacore.store.writer import Writer

BATCH = 1024
Table = dict[str, np.ndarray]


def sync(path: Path, drop: bool = False) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    if drop:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def write_ours(path: Path, data: np.ndarray) -> None:
    with Writer(path, {}) as writer:
        for start in range(0, len(data), BATCH):
            writer.append("x", data[start : start + BATCH])


def write_memmap(path: Path, data: np.ndarray) -> None:
    memmap = np.memmap(path, data.dtype, "w+", shape=data.shape)
    for start in range(0, len(data), BATCH):
        memmap[start : start + BATCH] = data[start : start + BATCH]
    memmap.flush()
    sync(path)


def write_h5py(path: Path, data: np.ndarray) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        chunks = (max(1, 2**20 // data[0].nbytes), data.shape[1])
        dataset = file.create_dataset(
            "x", (0, data.shape[1]), data.dtype, maxshape=(None, data.shape[1]), chunks=chunks, fletcher32=True
        )
        for start in range(0, len(data), BATCH):
            rows = data[start : start + BATCH]
            dataset.resize(start + len(rows), axis=0)
            dataset[start:] = rows
    sync(path)


def read_ours(path: Path, shape: tuple[int, ...], shuffled: bool) -> Iterator[np.ndarray]:
    with Reader(path) as reader:
        yield from reader.shuffled("x", BATCH, seed=0) if shuffled else reader.batches("x", BATCH)


def read_memmap(path: Path, shape: tuple[int, ...], shuffled: bool) -> Iterator[np.ndarray]:
    memmap = np.memmap(path, np.float32, "r", shape=shape)
    for start in starts(shape[0], shuffled):
        yield np.array(memmap[start : start + BATCH])


def read_h5py(path: Path, shape: tuple[int, ...], shuffled: bool) -> Iterator[np.ndarray]:
    with h5py.File(path) as file:
        for start in starts(shape[0], shuffled):
            yield file["x"][start : start + BATCH]


def starts(rows: int, shuffled: bool) -> np.ndarray:
    order = np.arange(0, rows, BATCH)
    return np.random.default_rng(0).permutation(order) if shuffled else order


WRITERS = {"ours": write_ours, "memmap": write_memmap, "h5py": write_h5py}
READERS = {"ours": read_ours, "memmap": read_memmap, "h5py": read_h5py}
READS = {
    "read warm": (False, False),
    "read cold": (False, True),
    "shuffled warm": (True, False),
    "shuffled cold": (True, True),
}


def bench(data: np.ndarray, folder: Path, repeats: int) -> Iterator[tuple[str, Table]]:
    """(operation, contestant -> MB/s [repeats]) one after the other. data: [rows, width]."""
    path = {name: folder / name for name in WRITERS}

    def turns(task: Callable[[str], None], before: Callable[[str], None]) -> Table:
        speeds: dict[str, list[float]] = {name: [] for name in WRITERS}
        for _ in range(repeats + 1):
            for name in WRITERS:
                before(name)
                start = time.perf_counter()
                task(name)
                speeds[name].append(data.nbytes / 1e6 / (time.perf_counter() - start))
        return {name: np.array(values[1:]) for name, values in speeds.items()}  # the first turn warms up

    yield (
        "write + fsync",
        turns(lambda name: WRITERS[name](path[name], data), lambda name: path[name].unlink(missing_ok=True)),
    )
    for label, (shuffled, cold) in READS.items():

        def consume(name: str, shuffled: bool = shuffled) -> None:
            for _ in READERS[name](path[name], data.shape, shuffled):
                pass

        yield label, turns(consume, lambda name, cold=cold: sync(path[name], drop=cold))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=96, help="size of the data, MB")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    data = np.random.default_rng(0).standard_normal(
        (args.rows, max(1, args.mb * 250_000 // args.rows)), dtype=np.float32
    )
    print(f"{args.rows} rows x {data.shape[1]} float32 = {data.nbytes / 1e6:.0f} MB, {args.repeats} turns; MB/s")
    print(f"{'':14}", *(f"{name:>8}" for name in WRITERS), "ours / memmap")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for label, speeds in bench(data, Path(folder), args.repeats):
            ratio = np.median(speeds["ours"] / speeds["memmap"])
            print(f"{label:14}", *(f"{np.median(values):8.0f}" for values in speeds.values()), f"{ratio:8.2f}")


if __name__ == "__main__":
    main()
