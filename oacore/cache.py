"""Activation store: one HDF5 file of row-aligned datasets, written once as a stream, read in slices or shuffled, refused when damaged.

The file is plain HDF5 (1.10 format, chunked, fletcher32): any HDF5 tool opens and checks it. Our own code goes beside the library,
whose fletcher32 runs at 2 GB/s at best:

* `Writer` computes fletcher32 itself (6 GB/s) and hands over finished chunks;
* `Reader` takes the chunks' offsets from HDF5, reads them with `preadv` straight into the caller's array, and verifies a cheaper
  checksum (`digest`, 47 GB/s) that `Writer` stores under `checksums/`. HDF5's metadata has checksums of its own.

Speed as a share of np.memmap's (kernels/bench/bench_cache.py, 64-200 MB, a busy 2-core EPYC): write + fsync 0.8-1.2, read from disk
1.0, read from the page cache 0.65-0.8: there memmap is one memcpy, and a checksum comes on top. Plain h5py: 0.7, 0.3-0.4, 0.03-0.1.
"""

import ctypes
import io
import json
import os
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from oacore import __version__
from oacore.checkpoint import atomic_path
from oacore.errors import UserError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
CHUNK_BYTES = 2**20  # fits a core's L2: copied, checksummed and written while hot
CHUNK_ROWS = 2**14  # narrow rows (labels) get shorter chunks, or each shuffled block of wide rows would read 1 MiB of labels
READ_BYTES = 2**21  # small batches are read this many bytes at a time; from 4 MiB on numpy asks for huge pages: 1.5x slower to fill
BUFFER_BYTES = 2**26
PAGE = 4096
_write_back = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux


def digest(raw: np.ndarray) -> int:
    """Checksum of bytes [n]: the CRC of the sums mod 2^64 of the 8-byte words of each 4 KiB page.

    Finds any error within one word, any lost, torn or misplaced page, and others but for 1 in 2^32; not words that swap within a page.
    """
    pages = raw.size // PAGE
    sums = np.add.reduce(raw[: pages * PAGE].view(np.uint64).reshape(pages, PAGE // 8), axis=1)  # [pages]
    return zlib.crc32(raw[pages * PAGE :].data, zlib.crc32(sums.data))


def fletcher32(raw: np.ndarray, size: int, scratch: np.ndarray) -> int:
    """HDF5's fletcher32 of the first `size` bytes of raw [pages * 4096], whose other bytes must be zero.

    Of the 16-bit words w_i, i < n: (sum w_i, sum (n - i) w_i) mod 65535, times 256 as HDF5 adds big-endian words and we little-endian.
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


def to_numpy(rows: "np.ndarray | torch.Tensor") -> tuple[np.ndarray, str]:
    """The rows as an array, and the name of their dtype. bfloat16 comes as uint16 bits; CPU tensors share their memory."""
    if isinstance(rows, np.ndarray):
        return rows, rows.dtype.str
    import torch

    rows = rows.detach().cpu()
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return rows.numpy(), rows.numpy().dtype.str


def to_torch(array: np.ndarray, bfloat16: bool = False) -> "torch.Tensor":
    """A tensor on the array's memory; with bfloat16 (see `Rows.bfloat16`) uint16 items are taken for its bits."""
    import torch

    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(array)


def _cause(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C inside is raised on leaving. Python would raise it in HDF5's callbacks, and h5py drops some: 1 file in 1000 was damaged."""
    if threading.current_thread() is not threading.main_thread():  # others never get it
        yield
        return
    waiting: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *event: waiting.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])


class _Sink(io.FileIO):
    """The file that HDF5 writes to. It must never see a write fail: its close then fails too, the descriptor leaks, and the interpreter
    dies of SIGSEGV at exit (HDF5 2.0). So the first error is kept for `Writer` to raise, and from then on bytes go nowhere."""

    error: Exception | None = None
    waiting = 0

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and not self.error:
                left = left[super().write(left) :]
            self.waiting += size
            if _write_back and self.waiting >= 2**24:  # the disk starts now, not at the fsync: 15 % less time
                _write_back(self.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), 2)  # whole file, SYNC_FILE_RANGE_WRITE
                self.waiting = 0
        except Exception as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if not self.error:
                super().truncate(size)
        except Exception as error:
            self.error = error
        return size or 0


class _Column:
    """A growing dataset. Rows wait in memory until they fill a chunk; only whole chunks go to the file."""

    def __init__(self, rows: np.ndarray, dtype: str, chunk_bytes: int) -> None:
        if not (rows.ndim and rows.dtype.kind in "biufS" and (row_bytes := rows.itemsize * int(np.prod(rows.shape[1:])))):
            raise ValueError(f"cannot store an array of shape {rows.shape} and dtype {rows.dtype}")
        fit = min(CHUNK_ROWS, max(1, chunk_bytes // row_bytes))
        self.chunk_rows = 1 << fit.bit_length() - 1  # a power of two: chunks of aligned datasets nest, and so do the usual batches
        self.dtype, self.shape, self.row_bytes = dtype, rows.shape[1:], row_bytes
        size = self.chunk_rows * row_bytes
        self.raw = np.zeros(-(-size // PAGE) * PAGE + 4, np.uint8)  # whole pages, and room for the checksum
        self.rows = self.raw[:size].view(rows.dtype).reshape(self.chunk_rows, *self.shape)  # [chunk_rows, ...]
        self.written = self.waiting = 0
        self.digests: list[int] = []
        self.dataset: Any = None


class Writer:
    """Context manager that writes `path` atomically: after any exception, Ctrl-C included, nothing is left.

    metadata: JSON-able values (model hash, prompts hash, dtype, config), stored as attributes; `Reader(expect=)` compares them.
    chunk_bytes: rows are stored in chunks of at most this size, or one row; it is also the memory held per dataset.
    Raises UserError if the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any], chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path, self.chunk_bytes = Path(path), chunk_bytes
        versions = {"schema_version": SCHEMA_VERSION, "package_version": __version__, "h5py_version": h5py.__version__}
        versions |= {"hdf5_version": h5py.version.hdf5_version, "numpy_version": np.__version__}
        if taken := metadata.keys() & {*versions, "datasets", "complete"}:
            raise ValueError(f"metadata keys are taken: {sorted(taken)}")
        self._attributes = {key: json.dumps(value).encode() for key, value in (versions | dict(metadata)).items()}
        self._columns: dict[str, _Column] = {}
        self._scratch = np.empty((2, 64, PAGE // 4), np.uint32)

    def __enter__(self) -> Self:
        try:
            with ExitStack() as stack:  # unwinds: finish, close HDF5, raise what the sink kept, close the file, fsync and rename
                with _ctrl_c_waits():
                    self._sink = stack.enter_context(_Sink(stack.enter_context(atomic_path(self.path)), "w+"))
                    stack.push(self._check)
                    self._file = stack.enter_context(h5py.File(self._sink, "w", libver=("v110", "v110")))
                    stack.push(self._finish)
                self._stack = stack.pop_all()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {_cause(error)}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with _ctrl_c_waits():
                self._stack.__exit__(kind, error, trace)
        except OSError as failure:  # fsync, rename
            raise UserError(f"{self.path}: cannot write: {_cause(failure)}") from failure

    def append(self, name: str, rows: "np.ndarray | torch.Tensor") -> None:
        """Append rows [n, ...] to dataset `name` ("group/name"); the first call fixes [...] and the dtype."""
        array, dtype = to_numpy(rows)
        if name.split("/")[0] == "checksums":
            raise ValueError(f"{name}: the group is taken")
        column = self._columns.get(name) or self._columns.setdefault(name, _Column(array, dtype, self.chunk_bytes))
        if (column.dtype, column.shape) != (dtype, array.shape[1:]):
            raise ValueError(f"{name}: rows {array.shape[1:]} {dtype} appended to rows {column.shape} {column.dtype}")
        start = 0
        while start < len(array):
            rows_in = array[start : start + column.chunk_rows - column.waiting]
            column.rows[column.waiting : column.waiting + len(rows_in)] = rows_in
            column.waiting += len(rows_in)
            start += len(rows_in)
            if column.waiting == column.chunk_rows:
                with _ctrl_c_waits():
                    self._flush(name, column)

    def put(self, name: str, array: "np.ndarray | torch.Tensor | Sequence[str]") -> None:
        """Write a whole dataset [n, ...]. A list of n strings is stored as fixed-width UTF-8 and comes back as a list."""
        if name in self._columns:
            raise ValueError(f"{name}: written twice")
        if isinstance(array, Sequence):
            encoded = [text.encode() for text in array]
            if any(text.endswith(b"\0") for text in encoded):
                raise ValueError(f"{name}: a text ends in NUL, which is the padding of fixed-width strings")
            array = np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")
        self.append(name, array)

    def _flush(self, name: str, column: _Column) -> None:
        """Write the waiting rows as one chunk, padded with zeros; a dataset shorter than a chunk gets a shorter chunk."""
        if column.dataset is None:
            column.chunk_rows = column.waiting or 1
            dtype = h5py.string_dtype("utf-8", column.rows.itemsize) if column.rows.dtype.kind == "S" else column.rows.dtype
            layout = {"chunks": (column.chunk_rows, *column.shape), "maxshape": (None, *column.shape), "fill_time": "never"}
            column.dataset = self._file.create_dataset(name, (0, *column.shape), dtype, fletcher32=True, **layout)
            column.dataset.attrs["dtype"] = np.bytes_(column.dtype)
        if column.waiting:
            size, used = column.chunk_rows * column.row_bytes, column.waiting * column.row_bytes
            column.raw[used:] = 0
            checksum = fletcher32(column.raw[:-4], size, self._scratch).to_bytes(4, "little")
            column.raw[size : size + 4] = np.frombuffer(checksum, np.uint8)
            column.digests.append(digest(column.raw[:used]))
            column.dataset.id.set_extent((column.written + column.waiting, *column.shape))
            column.dataset.id.write_direct_chunk((column.written, *(0 for _ in column.shape)), column.raw[: size + 4])
            column.written, column.waiting = column.written + column.waiting, 0
        self._check()

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        manifest = {}
        for name, column in self._columns.items():
            if column.waiting or column.dataset is None:
                self._flush(name, column)
            digests = np.array(column.digests, np.uint32)
            self._file.create_dataset(f"checksums/{name}", data=digests, maxshape=(None,), fletcher32=True)
            manifest[name] = {"shape": [column.written, *column.shape], "dtype": column.dtype, "chunk_rows": column.chunk_rows}
        self._attributes["datasets"] = json.dumps(manifest).encode()
        for key, value in self._attributes.items():
            self._file.attrs[key] = np.bytes_(value)
        self._file.attrs["complete"] = _crc(self._attributes)

    def _check(self, kind: type[BaseException] | None = None, *_: object) -> None:
        error = self._sink.error
        if error is None or kind is not None:
            return
        raise UserError(f"{self.path}: cannot write: {_cause(error)}") if isinstance(error, OSError) else error


def _crc(attributes: Mapping[str, bytes]) -> int:
    return zlib.crc32(b"\0".join(part for key in sorted(attributes) for part in (key.encode(), attributes[key])))


class Rows:
    """One dataset of a `Reader`: `len`, `shape` [n, ...], `dtype`, and slices that read only the chunks they touch.

    Text comes as str and list[str]. If `bfloat16`, the uint16 items are its bits: see `to_torch`.
    """

    def __init__(self, reader: "Reader", file: h5py.File, name: str, shape: list[int], dtype: str, chunk_rows: int) -> None:
        self.name, self.shape, self.chunk_rows = name, tuple(shape), chunk_rows
        self.bfloat16 = dtype == "bfloat16"
        self.dtype = np.dtype(np.uint16 if self.bfloat16 else dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        self._file, self._digests = reader._file, file[f"checksums/{name}"][:]  # [chunks]
        found, expected = (file[name].shape, file[name].dtype, file[name].chunks), (self.shape, self.dtype, (chunk_rows, *shape[1:]))
        if found != expected:
            raise ValueError(f"{name}: found {found}, expected {expected}")
        offsets: dict[int, int] = {}
        file[name].id.chunk_iter(lambda chunk: offsets.update({chunk.chunk_offset[0] // chunk_rows: chunk.byte_offset}))
        self._offsets = [offsets[k] for k in range(-(-len(self) // chunk_rows))]  # [chunks]
        self._last: tuple[int, np.ndarray] = -1, np.empty(0)  # the chunk that the last read ended in

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """numpy's basic indexing, with an integer or a slice in front: r[i], r[a:b:c], r[a:b, ..., j]."""
        first, *rest = key if isinstance(key, tuple) else (key,)
        span = range(len(self))[first]  # IndexError, TypeError
        if isinstance(span, int):
            return self._decode(self.read(span, span + 1)[(0, *rest)])
        low, high = (min(span[0], span[-1]), max(span[0], span[-1]) + 1) if span else (0, 0)
        return self._decode(self.read(low, high)[(slice(None, None, span.step), *rest)])

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) as stored (text as bytes), into `out` [stop - start, ...] if given. Raises UserError on damage."""
        shape = (stop - start, *self.shape[1:])
        out = np.empty(shape, self.dtype) if out is None else out
        if not (out.shape == shape and out.dtype == self.dtype and out.flags.c_contiguous):
            raise ValueError(f"{self.name}: out is {out.dtype} {out.shape}, expected contiguous {self.dtype} {shape}")
        for k in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            begin, end = k * self.chunk_rows, min((k + 1) * self.chunk_rows, len(self))
            low, high = max(begin, start), min(end, stop)
            if (low, high) == (begin, end):
                self._read_chunk(k, out[low - start : high - start])
                continue
            last, rows = self._last
            if last != k:
                rows = np.empty((end - begin, *self.shape[1:]), self.dtype)
                self._read_chunk(k, rows)
                self._last = k, rows
            out[low - start : high - start] = rows[low - begin : high - begin]
        return out

    def _read_chunk(self, k: int, out: np.ndarray) -> None:
        raw = out.reshape(-1).view(np.uint8)
        where = f"{self._file.name}: {self.name}, rows {k * self.chunk_rows} to {k * self.chunk_rows + len(out) - 1}"
        try:
            got = os.preadv(self._file.fileno(), [raw.data], self._offsets[k])
        except OSError as error:
            raise UserError(f"{where}: cannot read: {_cause(error)}") from error
        if got != raw.size:
            raise UserError(f"{where}: truncated, found {got} bytes, expected {raw.size}")
        if (found := digest(raw)) != self._digests[k]:
            raise UserError(f"{where}: damaged, found checksum {found:08x}, expected {self._digests[k]:08x}")

    def _decode(self, array: Any) -> Any:
        return np.char.decode(array, "utf-8").tolist() if self.dtype.kind == "S" else array

    def _prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to load rows [start, stop) meanwhile. It may cut a request at its read-ahead size, 128 KiB by default."""
        size = self.chunk_rows * self.row_bytes
        for k in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            for at in range(0, size, 2**17):
                os.posix_fadvise(self._file.fileno(), self._offsets[k] + at, 2**17, os.POSIX_FADV_WILLNEED)


class Reader:
    """A finished file, read only; a context manager. `reader[name]` is a `Rows`, `names` lists them, `metadata` holds `Writer`'s.

    expect: metadata that the file must carry, such as {"model_hash": ..., "prompts_hash": ...}.
    Raises UserError, naming the path and the cause: absent, truncated, damaged, unfinished, of another schema, model or prompts.
    """

    def __init__(self, path: str | Path, expect: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(open(path, "rb", buffering=0))
                self._load(expect or {})
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                state = "not found" if isinstance(error, FileNotFoundError) else f"truncated or damaged: {_cause(error)}"
                raise UserError(f"{path}: {state}, expected an activation cache") from error
            stack.pop_all()

    def _load(self, expect: Mapping[str, Any]) -> None:
        with h5py.File(self.path, "r", locking=False) as file:  # finished files never change, and some network disks cannot lock
            attributes = {key: value for key, value in file.attrs.items() if isinstance(value, bytes)}
            mark, crc = file.attrs.get("complete"), _crc(attributes)
            self.metadata: dict[str, Any] = {key: json.loads(value) for key, value in attributes.items()}
            for key, value in ({"schema_version": SCHEMA_VERSION} | dict(expect)).items():
                if (found := self.metadata.get(key)) != (expected := json.loads(json.dumps(value))):
                    raise UserError(f"{self.path}: {key}: found {found!r}, expected {expected!r}")
            if mark != crc:
                raise UserError(f"{self.path}: complete: found {mark}, expected {crc}: unfinished or damaged")
            self._rows = {name: Rows(self, file, name, **entry) for name, entry in self.metadata.pop("datasets").items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    def __getitem__(self, name: str) -> Rows:
        if name not in self._rows:
            raise UserError(f"{self.path}: dataset {name!r}: not found, expected one of {self.names}")
        return self._rows[name]

    def batches(self, names: str | Sequence[str], size: int) -> Iterator[Any]:
        """Slices of `size` rows in file order, the last one shorter: arrays [size, ...] for a name, {name: array} for a list.

        There is no read-ahead of ours: the kernel sees a sequential read and does it.
        """
        return (batch[names] if isinstance(names, str) else batch for batch in _in_order(self._aligned(names), size))

    def shuffled(
        self, names: str | Sequence[str], size: int, seed: int, epochs: int = 1, buffer_bytes: int = BUFFER_BYTES
    ) -> Iterator[Any]:
        """Batches of random rows, aligned over `names`, every row once per epoch; the same seed gives the same order.

        Random blocks of rows are read into a buffer of about `buffer_bytes` and shuffled there: neighbours in the file mostly come from
        the same buffer. Only the last batch of an epoch is shorter. Yields what `batches` yields.
        """
        shuffled = _shuffled(self._aligned(names), size, seed, epochs, buffer_bytes)
        return (batch[names] if isinstance(names, str) else batch for batch in shuffled)

    def _aligned(self, names: str | Sequence[str]) -> dict[str, Rows]:
        columns = {name: self[name] for name in ([names] if isinstance(names, str) else names)}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{self.path}: datasets have lengths {lengths}, expected the same")
        return columns


def _in_order(columns: dict[str, Rows], size: int) -> Iterator[dict[str, Any]]:
    count, row_bytes = len(next(iter(columns.values()))), sum(column.row_bytes for column in columns.values())
    span = size * max(1, READ_BYTES // (size * row_bytes))
    for start in range(0, count, span):
        rows = {name: column.read(start, min(start + span, count)) for name, column in columns.items()}
        for i in range(0, min(span, count - start), size):
            yield {name: columns[name]._decode(array[i : i + size]) for name, array in rows.items()}


def _shuffled(columns: dict[str, Rows], size: int, seed: int, epochs: int, buffer_bytes: int) -> Iterator[dict[str, Any]]:
    widest = max(columns.values(), key=lambda column: column.row_bytes)
    count, row_bytes = len(widest), sum(column.row_bytes for column in columns.values())
    # Whole chunks of the widest rows; 1/16 of the buffer if that is more, since each block reads the longer chunks of narrow rows too.
    block = max(widest.chunk_rows, 1 << (buffer_bytes // 16 // row_bytes).bit_length() >> 1)
    group = block * max(2, buffer_bytes // (block * row_bytes))
    pool = {name: np.empty((min(count, group + size), *c.shape[1:]), c.dtype) for name, c in columns.items()}
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        starts = random.permutation(np.arange(0, count, block)).tolist()
        held = 0  # rows in the pool
        while starts:
            now, starts = starts[: group // block], starts[group // block :]
            for start in now:
                stop = min(start + block, count)
                for name, column in columns.items():
                    column.read(start, stop, out=pool[name][held : held + stop - start])
                held += stop - start
            for start in starts[: group // block] if hasattr(os, "posix_fadvise") else ():
                for column in columns.values():  # a cold shuffle takes 10-25 % less time
                    column._prefetch(start, min(start + block, count))
            order = random.permutation(held)
            done = held - held % size if starts else held
            for i in range(0, done, size):
                rows = order[i : min(i + size, done)]
                yield {name: columns[name]._decode(array[rows]) for name, array in pool.items()}
            for array in pool.values():  # less than a batch waits for the next blocks
                array[: held - done] = array[order[done:]]
            held -= done
