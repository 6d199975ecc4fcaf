"""Activation store: one HDF5 file of row-aligned datasets, written once as a stream, read in slices or shuffled,
refused when damaged.

The file is plain HDF5 (1.10 format, chunked, fletcher32): any HDF5 tool opens and checks it. Our own code goes beside
the library, whose fletcher32 runs at 2 GB/s at best:

* `Writer` computes fletcher32 itself (6 GB/s) and hands over finished chunks;
* `Reader` takes the chunks' offsets from HDF5, reads them with `preadv` straight into the caller's array, and verifies
  a cheaper checksum (`digest`, 47 GB/s) that `Writer` stores under `checksums/`. HDF5's metadata has checksums of its
  own.

Speed as a share of np.memmap's (tests/bench/bench_cache.py, 64-200 MB, a busy 2-core EPYC): write + fsync 0.8-1.2, read
from disk 1.0, read from the page cache 0.65-0.8: there memmap is one memcpy, and a checksum comes on top. Plain h5py:
0.7, 0.3-0.4, 0.03-0.1.
"""

import ctypes
import io
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from oacore import __version__
from oacore.errors import UserError, cause
from oacore.store.atomic import atomic_path
from oacore.store.checksums import PAGE, SCHEMA_VERSION, chunk_digest, crc, fletcher32
from oacore.store.provenance import Provenance

if TYPE_CHECKING:
    import torch


CHUNK_BYTES = 2**20  # fits a core's L2: copied, checksummed and written while hot
CHUNK_ROWS = (
    2**14
)  # narrow rows (labels) get shorter chunks, or each shuffled block of wide rows would read 1 MiB of labels
_write_back = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux


def to_numpy(rows: "np.ndarray | torch.Tensor") -> tuple[np.ndarray, str]:
    """The rows as an array, and the name of their dtype. bfloat16 comes as uint16 bits; CPU tensors share their
    memory.
    """
    if isinstance(rows, np.ndarray):
        return rows, rows.dtype.str
    import torch

    rows = rows.detach().cpu()
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return rows.numpy(), rows.numpy().dtype.str


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C inside is raised on leaving. Python would raise it in HDF5's callbacks, and h5py drops some: 1 file in
    1000 was damaged.
    """
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
    """The file that HDF5 writes to. It must never see a write fail: its close then fails too, the descriptor leaks, and
    the interpreter dies of SIGSEGV at exit (HDF5 2.0). So the first error is kept for `Writer` to raise, and from then
    on bytes go nowhere."""

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
        if not (
            rows.ndim and rows.dtype.kind in "biufS" and (row_bytes := rows.itemsize * int(np.prod(rows.shape[1:])))
        ):
            raise ValueError(f"cannot store an array of shape {rows.shape} and dtype {rows.dtype}")
        fit = min(CHUNK_ROWS, max(1, chunk_bytes // row_bytes))
        self.chunk_rows = (
            1 << fit.bit_length() - 1
        )  # a power of two: chunks of aligned datasets nest, and so do the usual batches
        self.dtype, self.shape, self.row_bytes = dtype, rows.shape[1:], row_bytes
        size = self.chunk_rows * row_bytes
        self.raw = np.zeros(-(-size // PAGE) * PAGE + 4, np.uint8)  # whole pages, and room for the checksum
        self.rows = self.raw[:size].view(rows.dtype).reshape(self.chunk_rows, *self.shape)  # [chunk_rows, ...]
        self.written = self.waiting = 0
        self.digests: list[int] = []
        self.dataset: Any = None


class Writer:
    """Context manager that writes `path` atomically: after any exception, Ctrl-C included, nothing is left.

    provenance: model hash, prompts hash, dtype, settings, stored as attributes; `Reader` compares what is required.
    chunk_bytes: rows are stored in chunks of at most this size, or one row; it is also the memory held per dataset.
    Raises UserError if the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: str | Path, provenance: Provenance, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path, self.chunk_bytes = Path(path), chunk_bytes
        versions = {"schema_version": SCHEMA_VERSION, "package_version": __version__, "h5py_version": h5py.__version__}
        versions |= {"hdf5_version": h5py.version.hdf5_version, "numpy_version": np.__version__}
        if taken := provenance.facts.keys() & {*versions, "datasets", "complete"}:
            raise ValueError(f"keys are taken: {sorted(taken)}")
        self._attributes = {key: json.dumps(value).encode() for key, value in (versions | provenance.facts).items()}
        self._columns: dict[str, _Column] = {}
        self._scratch = np.empty((2, 64, PAGE // 4), np.uint32)

    def __enter__(self) -> Self:
        try:
            with (
                ExitStack() as stack
            ):  # unwinds: finish, close HDF5, raise what the sink kept, close the file, fsync and rename
                with _ctrl_c_waits():
                    self._sink = stack.enter_context(_Sink(stack.enter_context(atomic_path(self.path)), "w+"))
                    stack.push(self._check)
                    self._file = stack.enter_context(h5py.File(self._sink, "w", libver=("v110", "v110")))
                    stack.push(self._finish)
                self._stack = stack.pop_all()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {cause(error)}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _ctrl_c_waits():
                self._stack.__exit__(kind, error, trace)
        except OSError as failure:  # fsync, rename
            raise UserError(f"{self.path}: cannot write: {cause(failure)}") from failure

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
        """Write a whole dataset [n, ...]. A list of n strings is stored as fixed-width UTF-8 and comes back as a
        list.
        """
        if name in self._columns:
            raise ValueError(f"{name}: written twice")
        if isinstance(array, Sequence):
            encoded = [text.encode() for text in array]
            if any(text.endswith(b"\0") for text in encoded):
                raise ValueError(f"{name}: a text ends in NUL, which is the padding of fixed-width strings")
            array = np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")
        self.append(name, array)

    def _flush(self, name: str, column: _Column) -> None:
        """Write the waiting rows as one chunk, padded with zeros; a dataset shorter than a chunk gets a shorter
        chunk.
        """
        if column.dataset is None:
            column.chunk_rows = column.waiting or 1
            dtype = (
                h5py.string_dtype("utf-8", column.rows.itemsize) if column.rows.dtype.kind == "S" else column.rows.dtype
            )
            layout = {
                "chunks": (column.chunk_rows, *column.shape),
                "maxshape": (None, *column.shape),
                "fill_time": "never",
            }
            column.dataset = self._file.create_dataset(name, (0, *column.shape), dtype, fletcher32=True, **layout)
            column.dataset.attrs["dtype"] = np.bytes_(column.dtype)
        if column.waiting:
            size, used = column.chunk_rows * column.row_bytes, column.waiting * column.row_bytes
            column.raw[used:] = 0
            checksum = fletcher32(column.raw[:-4], size, self._scratch).to_bytes(4, "little")
            column.raw[size : size + 4] = np.frombuffer(checksum, np.uint8)
            column.digests.append(chunk_digest(column.raw[:used]))
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
            manifest[name] = {
                "shape": [column.written, *column.shape],
                "dtype": column.dtype,
                "chunk_rows": column.chunk_rows,
            }
        self._attributes["datasets"] = json.dumps(manifest).encode()
        for key, value in self._attributes.items():
            self._file.attrs[key] = np.bytes_(value)
        self._file.attrs["complete"] = crc(self._attributes)

    def _check(self, kind: type[BaseException] | None = None, *_: object) -> None:
        error = self._sink.error
        if error is None or kind is not None:
            return
        raise UserError(f"{self.path}: cannot write: {cause(error)}") if isinstance(error, OSError) else error
