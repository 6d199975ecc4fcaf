"""Activation store: one HDF5 file of row-aligned datasets, written once in a stream, read in slices or shuffled, refused when damaged.

Plain HDF5 (1.10 format, chunked, fletcher32), so any HDF5 tool opens it and checks it. Our own reader takes another road, for speed.
HDF5's fletcher32 runs at 2 GB/s inside a library-wide lock; np.memmap reads a warm file at 15 GB/s (EPYC, 2 cores). So `Reader` takes the
chunks' offsets from HDF5's index, reads them with `preadv` straight into the caller's array, and verifies a second checksum (see `digest`,
47 GB/s) that `Writer` stores beside the data, under `checksums/`. Metadata is covered by HDF5's own checksums, and by a CRC in `complete`.
"""

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
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
BUFFER_BYTES = 2**26
PAGE = 4096


def digest(raw: np.ndarray) -> int:
    """Checksum of bytes [n]: the CRC of the sums mod 2^64 of each 4 KiB page's 8-byte words.

    Finds every error within one word, every lost, moved or torn page, and others but for 1 in 2^32; not words that trade places in a page.
    """
    pages = raw.size // PAGE
    sums = np.add.reduce(raw[: pages * PAGE].view(np.uint64).reshape(pages, PAGE // 8), axis=1)  # [pages]
    return zlib.crc32(raw[pages * PAGE :], zlib.crc32(sums))


def fletcher32(raw: np.ndarray, size: int, scratch: np.ndarray) -> int:
    """HDF5's fletcher32 of the first `size` bytes of raw [pages * 4096], whose other bytes are zero; 6 GB/s.

    With little-endian words w_i, i < n: (sum w_i, sum (n - i) w_i) mod 65535, times 256 because HDF5 adds big-endian words.
    scratch: uint32 [2, 64, 1024]; temporaries from the allocator made this 5x slower (page faults).
    """
    words = raw.view(np.uint32).reshape(-1, PAGE // 4)  # [pages, 1024], two 16-bit words in each
    highs, rows, columns = 0, [np.zeros(0, np.uint64)], np.zeros(PAGE // 4, np.uint64)
    for block in np.split(words, range(64, len(words), 64)):
        high, low = scratch[:, : len(block)]
        np.right_shift(block, 16, out=high)
        np.bitwise_and(block, 0xFFFF, out=low)
        highs += int(np.add.reduce(high, axis=1, dtype=np.uint32).sum(dtype=np.uint64))
        high += low
        rows.append(np.add.reduce(high, axis=1, dtype=np.uint32).astype(np.uint64))
        columns += np.add.reduce(high, axis=0, dtype=np.uint32)
    row = np.concatenate(rows)  # [pages]
    total = int(row.sum())
    pairs = PAGE // 4 * int(row @ np.arange(len(row), dtype=np.uint64)) + int(columns @ np.arange(PAGE // 4, dtype=np.uint64))
    sums = 256 * total, 256 * ((size + 1) // 2 * total - 2 * pairs - highs)
    first, second = ((s - 1) % 65535 + 1 if s else 0 for s in sums)  # ones' complement: zero only if every word is
    return second << 16 | first


def to_numpy(rows: "np.ndarray | torch.Tensor") -> tuple[np.ndarray, str]:
    """Array of any shape and its dtype name; bfloat16 tensors come as uint16, unconverted. CPU tensors are not copied."""
    if isinstance(rows, np.ndarray):
        return rows, rows.dtype.str
    import torch

    rows = rows.detach().cpu()
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return rows.numpy(), rows.numpy().dtype.str


def to_torch(array: np.ndarray, bfloat16: bool = False) -> "torch.Tensor":
    """Tensor on the array's memory; with bfloat16 (see `Rows.bfloat16`) its 2-byte items are read as such."""
    import torch

    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(array)


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def _first_line(error: BaseException) -> str:
    return f"{getattr(error, 'strerror', None) or error}".partition("\n")[0]


class _Sink(io.FileIO):
    """The file under HDF5, which must never see a write fail: its close then fails too, leaks the descriptor, and the interpreter
    dies of SIGSEGV at exit (HDF5 2.0). So the first error is kept for `Writer` to raise, and what follows goes nowhere."""

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and not self.error:
                left = left[super().write(left) :]
        except BaseException as error:  # KeyboardInterrupt too
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            if not self.error:
                super().truncate(size)
        except BaseException as error:
            self.error = error
        return size or 0


class _Column:
    """A growing dataset: one chunk of rows waits in memory, only whole chunks reach the file."""

    def __init__(self, rows: np.ndarray, dtype: str, chunk_bytes: int) -> None:
        self.dtype, self.shape = dtype, rows.shape[1:]
        self.row_bytes = rows.itemsize * int(np.prod(self.shape))
        if not self.row_bytes or rows.dtype.kind not in "biufS":
            raise ValueError(f"rows of shape {rows.shape} and dtype {rows.dtype} cannot be stored")
        fit = min(CHUNK_ROWS, max(1, chunk_bytes // self.row_bytes))
        self.chunk_rows = 1 << fit.bit_length() - 1  # a power of two: chunks of aligned datasets nest, and so do common batches
        size = self.chunk_rows * self.row_bytes
        self.raw = np.zeros(-(-size // PAGE) * PAGE + 4, np.uint8)  # whole pages, and room for the checksum
        self.rows = self.raw[:size].view(rows.dtype).reshape(self.chunk_rows, *self.shape)  # [chunk_rows, ...]
        self.written = self.waiting = 0
        self.digests: list[int] = []
        self.dataset: Any = None


class Writer:
    """Context manager that writes `path` atomically: after any exception, Ctrl-C included, nothing is left.

    metadata: JSON-able values (model hash, prompts hash, dtype, config), stored as attributes and checked by `Reader(expect=)`.
    chunk_bytes: rows are stored in chunks of at most this size, or one row; also the memory held per dataset.
    Raises UserError if the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any], chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path, self.chunk_bytes = Path(path), chunk_bytes
        versions = {"schema_version": SCHEMA_VERSION, "package_version": __version__, "h5py_version": h5py.__version__}
        versions |= {"hdf5_version": h5py.version.hdf5_version, "numpy_version": np.__version__}
        if taken := metadata.keys() & (versions.keys() | {"datasets", "complete"}):
            raise ValueError(f"metadata keys are taken: {sorted(taken)}")
        self._attributes = {key: json.dumps(value).encode() for key, value in (versions | dict(metadata)).items()}
        self._columns: dict[str, _Column] = {}
        self._scratch = np.empty((2, 64, PAGE // 4), np.uint32)

    def __enter__(self) -> Self:
        try:
            with ExitStack() as stack:  # left in reverse: finish, close HDF5, raise what the sink kept, close the file, fsync and rename
                self._sink = stack.enter_context(_Sink(stack.enter_context(atomic_path(self.path)), "w+"))
                stack.push(self._check)
                self._file = stack.enter_context(h5py.File(self._sink, "w", libver=("v110", "v110")))
                stack.push(self._finish)
                self._stack = stack.pop_all()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {_first_line(error)}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        except OSError as failure:
            raise UserError(f"{self.path}: cannot write: {_first_line(failure)}") from failure

    def append(self, name: str, rows: "np.ndarray | torch.Tensor") -> None:
        """Append rows [n, ...] to dataset `name` ("group/name"), created by the first call; shape [...] and dtype stay."""
        array, dtype = to_numpy(rows)
        column = self._columns.get(name)
        if column is None:
            if name.split("/")[0] == "checksums":
                raise ValueError(f"{name}: the group 'checksums' is taken")
            column = self._columns[name] = _Column(array, dtype, self.chunk_bytes)
        if (column.dtype, column.shape) != (dtype, array.shape[1:]):
            raise ValueError(f"{name}: rows {array.shape[1:]} {dtype} appended to rows {column.shape} {column.dtype}")
        start = 0
        while start < len(array):
            take = min(len(array) - start, column.chunk_rows - column.waiting)
            column.rows[column.waiting : column.waiting + take] = array[start : start + take]
            column.waiting += take
            start += take
            if column.waiting == column.chunk_rows:
                self._flush(name, column)

    def put(self, name: str, array: "np.ndarray | torch.Tensor | Sequence[str]") -> None:
        """Write a whole dataset [n, ...] at once; a list of n strings is stored as fixed-width UTF-8 and read back as a list."""
        if name in self._columns:
            raise ValueError(f"{name}: written twice")
        if isinstance(array, Sequence):
            encoded = [text.encode() for text in array]
            if any(text.endswith(b"\0") for text in encoded):
                raise ValueError(f"{name}: a text ends in NUL, which pads fixed-width strings")
            array = np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")
        self.append(name, array)

    def _flush(self, name: str, column: _Column) -> None:
        """Write the waiting rows as one chunk, padded with zeros. A dataset shorter than a chunk gets a shorter chunk."""
        if column.dataset is None:
            column.chunk_rows = column.waiting or 1
            dtype = h5py.string_dtype("utf-8", column.rows.itemsize) if column.rows.dtype.kind == "S" else column.rows.dtype
            chunks = (column.chunk_rows, *column.shape)
            column.dataset = self._file.create_dataset(
                name, (0, *column.shape), dtype, chunks=chunks, maxshape=(None, *column.shape), fletcher32=True, fill_time="never"
            )
            column.dataset.attrs["dtype"] = np.bytes_(column.dtype)
        if column.waiting:
            size, used = column.chunk_rows * column.row_bytes, column.waiting * column.row_bytes
            column.raw[used:] = 0
            checksum = fletcher32(column.raw[:-4], size, self._scratch)
            column.digests.append(digest(column.raw[:used]))
            column.raw[size : size + 4] = np.frombuffer(checksum.to_bytes(4, "little"), np.uint8)
            column.dataset.resize(column.written + column.waiting, axis=0)
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
            self._file.create_dataset(f"checksums/{name}", data=digests, chunks=(max(1, len(digests)),), fletcher32=True)
            manifest[name] = {"shape": [column.written, *column.shape], "dtype": column.dtype, "chunk_rows": column.chunk_rows}
        self._attributes["datasets"] = json.dumps(manifest).encode()
        for key, value in self._attributes.items():
            self._file.attrs[key] = np.bytes_(value)
        self._file.attrs["complete"] = _crc(self._attributes)

    def _check(self, kind: type[BaseException] | None = None, *_: object) -> None:
        error = self._sink.error
        if error is None or kind is not None:
            return
        if isinstance(error, OSError):
            raise UserError(f"{self.path}: cannot write: {_first_line(error)}") from error
        raise error


def _crc(attributes: Mapping[str, bytes]) -> int:
    return zlib.crc32(b"\0".join(part for key in sorted(attributes) for part in (key.encode(), attributes[key])))


class Rows:
    """One dataset of a `Reader`: `len`, `shape` [n, ...], numpy `dtype`, and slices that read only the chunks they touch.

    Text comes as list[str]. `bfloat16`: the uint16 items are bfloat16 bits, see `to_torch`.
    """

    def __init__(
        self, name: str, file: io.FileIO, dataset: Any, digests: np.ndarray, shape: list[int], dtype: str, chunk_rows: int
    ) -> None:
        self.name, self.shape, self.dtype, self.bfloat16 = name, tuple(shape), _numpy_dtype(dtype), dtype == "bfloat16"
        self.chunk_rows, self._file, self._digests = chunk_rows, file, digests
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        found = (dataset.shape, dataset.dtype, dataset.chunks)
        if found != (self.shape, self.dtype, (chunk_rows, *self.shape[1:])):
            raise ValueError(f"{name}: found {found}, recorded {shape} {dtype}")
        chunks: dict[int, int] = {}
        dataset.id.chunk_iter(lambda chunk: chunks.update({chunk.chunk_offset[0] // chunk_rows: chunk.byte_offset}))
        self._offsets = [chunks[k] for k in range(-(-len(self) // chunk_rows))]  # [chunks]
        if len(digests) != len(self._offsets):
            raise ValueError(f"{name}: {len(self._offsets)} chunks, {len(digests)} checksums")
        self._last: tuple[int, np.ndarray] = -1, np.empty(0)  # the chunk that batches last met half-way

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """r[i], r[a:b:c], r[a:b, ...]: like numpy's basic indexing, except that the first index is an int or a slice."""
        first, *rest = key if isinstance(key, tuple) else (key,)
        if not isinstance(first, slice):
            index = range(len(self))[first]  # IndexError, TypeError
            rows = self.read(index, index + 1)[0]
            return self._decode(rows[tuple(rest)] if rest else rows)
        span = range(len(self))[first]
        rows = self.read(min(span), max(span) + 1)[:: span.step] if span else self.read(0, 0)
        return self._decode(rows[(slice(None), *rest)])

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) as stored (texts as bytes), into `out` [stop - start, ...] if given. Raises UserError on damage."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype) if out is None else out
        c = self.chunk_rows
        for k in range(start // c, -(-stop // c)):
            begin, end = k * c, min(k * c + c, len(self))
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
        where = f"{self._file.name}: {self.name}: rows {k * self.chunk_rows}-{k * self.chunk_rows + len(out) - 1}"
        try:
            got = os.preadv(self._file.fileno(), [raw], self._offsets[k])
        except OSError as error:
            raise UserError(f"{where}: cannot read: {_first_line(error)}") from error
        if got != raw.size:
            raise UserError(f"{where}: truncated, found {got} bytes, expected {raw.size}")
        if (found := digest(raw)) != self._digests[k]:
            raise UserError(f"{where}: damaged, found checksum {found:08x}, expected {self._digests[k]:08x}")

    def _decode(self, array: Any) -> Any:
        if self.dtype.kind != "S":
            return array
        return np.char.decode(array, "utf-8").tolist()

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to load rows [start, stop) in the background."""
        if hasattr(os, "posix_fadvise"):
            for k in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
                size = self.chunk_rows * self.row_bytes
                for at in range(0, size, 2**17):
                    os.posix_fadvise(self._file.fileno(), self._offsets[k] + at, min(2**17, size - at), os.POSIX_FADV_WILLNEED)


class Reader:
    """Read-only activation store; a context manager.

    expect: metadata that the file must carry, such as {"model_hash": ..., "prompts_hash": ...}.
    Raises UserError, naming the path and the cause: absent, truncated, damaged, unfinished, of another schema, model or prompts.
    """

    def __init__(self, path: str | Path, expect: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(open(path, "rb", buffering=0))
                attributes, self._rows = self._load()
            except UserError:
                raise
            except FileNotFoundError:
                raise UserError(f"{path}: no such file, expected an activation cache") from None
            except Exception as error:  # h5py raises nearly every type on damaged metadata
                raise UserError(f"{path}: truncated or damaged: {_first_line(error)}") from error
            self.metadata = {key: json.loads(value) for key, value in attributes.items() if key != "datasets"}
            for key, value in (expect or {}).items():
                found, expected = self.metadata.get(key), json.loads(json.dumps(value))
                if found != expected:
                    raise UserError(f"{path}: {key}: found {found!r}, expected {expected!r}")
            stack.pop_all()

    def _load(self) -> tuple[dict[str, bytes], dict[str, Rows]]:
        with h5py.File(self.path, "r", locking=False) as file:  # finished files never change, and some network disks cannot lock
            attributes = {key: bytes(value) for key, value in file.attrs.items() if key != "complete"}
            if (found := json.loads(attributes.get("schema_version", b"null"))) != SCHEMA_VERSION:
                raise UserError(f"{self.path}: schema_version: found {found}, expected {SCHEMA_VERSION}")
            if (mark := file.attrs.get("complete")) != _crc(attributes):
                raise UserError(f"{self.path}: complete: found {mark}, expected {_crc(attributes)}: unfinished or damaged")
            manifest = json.loads(attributes["datasets"])
            return attributes, {n: Rows(n, self._file, file[n], file[f"checksums/{n}"][:], **entry) for n, entry in manifest.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Rows:
        if name not in self._rows:
            raise UserError(f"{self.path}: dataset {name!r} is missing, found {self.names}")
        return self._rows[name]

    def _aligned(self, names: str | Sequence[str]) -> dict[str, Rows]:
        columns = {name: self[name] for name in ([names] if isinstance(names, str) else names)}
        if len({len(column) for column in columns.values()}) != 1:
            raise UserError(f"{self.path}: datasets of different lengths: { {n: len(c) for n, c in columns.items()} }")
        return columns

    def batches(self, names: str | Sequence[str], size: int) -> Iterator[Any]:
        """Slices of `size` rows in file order (the last is shorter): arrays [size, ...] for one name, {name: array} for several."""
        columns = self._aligned(names)
        count = len(next(iter(columns.values())))
        return (
            _pack(names, {n: c[i : i + size] for n, c in columns.items()}) for i in range(0, count, size)
        )  # no read-ahead of ours: the kernel sees a sequential read

    def shuffled(
        self, names: str | Sequence[str], size: int, seed: int, epochs: int = 1, buffer_bytes: int = BUFFER_BYTES
    ) -> Iterator[Any]:
        """Batches in random order, rows aligned over `names`, each row once per epoch; the same seed gives the same order.

        Blocks of rows are drawn at random into a buffer of `buffer_bytes` (never under two blocks) and its rows are shuffled: near rows
        tend to come within the same buffer. Only an epoch's last batch is shorter. Yields as `batches` does.
        """
        return (_pack(names, batch) for batch in _shuffle(self._aligned(names), size, seed, epochs, buffer_bytes))


def _pack(names: str | Sequence[str], batch: dict[str, Any]) -> Any:
    return batch[names] if isinstance(names, str) else batch


def _shuffle(columns: dict[str, Rows], size: int, seed: int, epochs: int, buffer_bytes: int) -> Iterator[dict[str, Any]]:
    widest = max(columns.values(), key=lambda column: column.row_bytes)
    count, row_bytes = len(widest), sum(column.row_bytes for column in columns.values())
    # Whole chunks of the widest dataset; a sixteenth of the buffer if that is more, since others' longer chunks are read for each block.
    block = max(widest.chunk_rows, 1 << (buffer_bytes // 16 // row_bytes).bit_length() >> 1)
    group = max(2, buffer_bytes // (block * row_bytes))
    pool = {n: np.empty((min(count, group * block + size), *c.shape[1:]), c.dtype) for n, c in columns.items()}
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        starts = random.permutation(np.arange(0, count, block))
        held = 0
        for at in range(0, len(starts), group):
            for start in starts[at : at + group]:
                rows = min(block, count - start)
                for name, column in columns.items():
                    column.read(start, start + rows, out=pool[name][held : held + rows])
                held += rows
            for start in starts[at + group : at + 2 * group]:
                for column in columns.values():
                    column.prefetch(start, min(start + block, count))
            order = random.permutation(held)
            whole = held if at + group >= len(starts) else held - held % size
            for i in range(0, whole, size):
                batch = order[i : min(i + size, whole)]
                yield {name: columns[name]._decode(rows[batch]) for name, rows in pool.items()}
            rest = order[whole:]  # fewer rows than a batch: they wait for the next blocks
            for rows in pool.values():
                rows[: len(rest)] = rows[rest]
            held = len(rest)
