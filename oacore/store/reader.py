"""Read the activation store: slices or shuffled batches of its rows, each chunk held against its checksum."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from oacore.errors import UserError, cause
from oacore.store.artefacts import ANY
from oacore.store.checksums import SCHEMA_VERSION, chunk_digest, crc
from oacore.store.provenance import Provenance

if TYPE_CHECKING:
    import torch


READ_BYTES = (
    2**21
)  # small batches are read this many bytes at a time; from 4 MiB on numpy asks for huge pages: 1.5x slower to fill
BUFFER_BYTES = 2**26


def to_torch(array: np.ndarray, bfloat16: bool = False) -> "torch.Tensor":
    """A tensor on the array's memory; with bfloat16 (see `StoredRows.bfloat16`) uint16 items are taken for its bits."""
    import torch

    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(array)


class StoredRows:
    """One dataset of a `Reader`: `len`, `shape` [n, ...], `dtype`, and slices that read only the chunks they touch.

    Text comes as str and list[str]. If `bfloat16`, the uint16 items are its bits: see `to_torch`.
    """

    def __init__(
        self, reader: "Reader", file: h5py.File, name: str, shape: list[int], dtype: str, chunk_rows: int
    ) -> None:
        self.name, self.shape, self.chunk_rows = name, tuple(shape), chunk_rows
        self.bfloat16 = dtype == "bfloat16"
        self.dtype = np.dtype(np.uint16 if self.bfloat16 else dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        self._file, self._digests = reader._file, file[f"checksums/{name}"][:]  # [chunks]
        stored, expected = (
            (file[name].shape, file[name].dtype, file[name].chunks),
            (self.shape, self.dtype, (chunk_rows, *shape[1:])),
        )
        if stored != expected:
            raise ValueError(f"{name}: found {stored}, expected {expected}")
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
        """Rows [start, stop) as stored (text as bytes), into `out` [stop - start, ...] if given. Raises UserError on
        damage.
        """
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
            raise UserError(f"{where}: cannot read: {cause(error)}") from error
        if got != raw.size:
            raise UserError(f"{where}: truncated, found {got} bytes, expected {raw.size}")
        if (found := chunk_digest(raw)) != self._digests[k]:
            raise UserError(f"{where}: damaged, found checksum {found:08x}, expected {self._digests[k]:08x}")

    def _decode(self, array: Any) -> Any:
        return np.char.decode(array, "utf-8").tolist() if self.dtype.kind == "S" else array

    def _prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to load rows [start, stop) meanwhile. It may cut a request at its read-ahead size, 128 KiB by
        default.
        """
        size = self.chunk_rows * self.row_bytes
        for k in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            for at in range(0, size, 2**17):
                os.posix_fadvise(self._file.fileno(), self._offsets[k] + at, 2**17, os.POSIX_FADV_WILLNEED)


class Reader:
    """A finished file, read only; a context manager. `reader[name]` is a `StoredRows`, `names` lists them, `metadata`
    holds `Writer`'s.

    provenance: what the file must belong to, such as Provenance({"model_hash": ..., "prompts_hash": ...}).
    Raises UserError, naming the path and the cause: absent, truncated, damaged, unfinished, of another schema, model or
    prompts.
    """

    def __init__(self, path: str | Path, provenance: Provenance = ANY) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(open(path, "rb", buffering=0))
                self._load(provenance)
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                state = "not found" if isinstance(error, FileNotFoundError) else f"truncated or damaged: {cause(error)}"
                raise UserError(f"{path}: {state}, expected an activation cache") from error
            stack.pop_all()

    def _load(self, provenance: Provenance) -> None:
        with h5py.File(
            self.path, "r", locking=False
        ) as file:  # finished files never change, and some network disks cannot lock
            attributes = {key: value for key, value in file.attrs.items() if isinstance(value, bytes)}
            mark, expected_mark = file.attrs.get("complete"), crc(attributes)
            self.metadata: dict[str, Any] = {key: json.loads(value) for key, value in attributes.items()}
            for key, value in {"schema_version": SCHEMA_VERSION, **provenance.required}.items():
                if (found := self.metadata.get(key)) != (expected := json.loads(json.dumps(value))):
                    raise UserError(f"{self.path}: {key}: found {found!r}, expected {expected!r}")
            if mark != expected_mark:
                raise UserError(f"{self.path}: complete: found {mark}, expected {expected_mark}: unfinished or damaged")
            self._rows = {
                name: StoredRows(self, file, name, **entry) for name, entry in self.metadata.pop("datasets").items()
            }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def names(self) -> list[str]:
        """Of all datasets."""
        return list(self._rows)

    def __getitem__(self, name: str) -> StoredRows:
        if name not in self._rows:
            raise UserError(f"{self.path}: dataset {name!r}: not found, expected one of {self.names}")
        return self._rows[name]

    def batches(self, names: str | Sequence[str], size: int) -> Iterator[Any]:
        """Slices of `size` rows in file order, the last one shorter: arrays [size, ...] for a name, {name: array} for a
        list.

        There is no read-ahead of ours: the kernel sees a sequential read and does it.
        """
        return (batch[names] if isinstance(names, str) else batch for batch in _in_order(self._aligned(names), size))

    def shuffled(
        self, names: str | Sequence[str], size: int, seed: int, epochs: int = 1, buffer_bytes: int = BUFFER_BYTES
    ) -> Iterator[Any]:
        """Batches of random rows, aligned over `names`, every row once per epoch; the same seed gives the same order.

        Random blocks of rows are read into a buffer of about `buffer_bytes` and shuffled there: neighbours in the file
        mostly come from the same buffer. Only the last batch of an epoch is shorter. Yields what `batches` yields.
        """
        shuffled = _shuffled(self._aligned(names), size, seed, epochs, buffer_bytes)
        return (batch[names] if isinstance(names, str) else batch for batch in shuffled)

    def _aligned(self, names: str | Sequence[str]) -> dict[str, StoredRows]:
        columns = {name: self[name] for name in ([names] if isinstance(names, str) else names)}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{self.path}: datasets have lengths {lengths}, expected the same")
        return columns


def _in_order(columns: dict[str, StoredRows], size: int) -> Iterator[dict[str, Any]]:
    count, row_bytes = len(next(iter(columns.values()))), sum(column.row_bytes for column in columns.values())
    span = size * max(1, READ_BYTES // (size * row_bytes))
    for start in range(0, count, span):
        rows = {name: column.read(start, min(start + span, count)) for name, column in columns.items()}
        for i in range(0, min(span, count - start), size):
            yield {name: columns[name]._decode(array[i : i + size]) for name, array in rows.items()}


def _shuffled(
    columns: dict[str, StoredRows], size: int, seed: int, epochs: int, buffer_bytes: int
) -> Iterator[dict[str, Any]]:
    widest = max(columns.values(), key=lambda column: column.row_bytes)
    count, row_bytes = len(widest), sum(column.row_bytes for column in columns.values())
    # Whole chunks of the widest rows; 1/16 of the buffer if that is more, since each block reads the longer chunks of
    # narrow rows too.
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
