"""The activation store gives back what it was given, or refuses: it never gives anything else."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oacore.errors import UserError
from oacore.store import writer
from oacore.store.checksums import fletcher32
from oacore.store.provenance import Provenance
from oacore.store.reader import READ_BYTES, Reader, to_torch
from oacore.store.writer import Writer

DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_, np.int16])


def numbered(path: Path, rows: int, chunk_bytes: int = 4096, **widths: int) -> None:
    """A file whose datasets are aligned: every item of row i is i."""
    with Writer(path, Provenance({"model_hash": "m"}), chunk_bytes) as writer:
        for name, width in widths.items():
            writer.append(name, np.repeat(np.arange(rows, dtype=np.int32)[:, None], width, axis=1))


def write(path: Path, *parts: tuple[str, Any], error: BaseException | None = None) -> None:
    with Writer(path, Provenance(), chunk_bytes=100) as writer:
        for name, rows in parts:
            writer.append(name, rows)
        if error:
            raise error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "writer.h5"


# --- round trip


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=DTYPES, chunk_bytes=st.integers(1, 9000))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: type, chunk_bytes: int
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
    rows = data.draw(st.integers(0, 300))
    seed = data.draw(st.integers(0, 99))
    array = np.random.default_rng(seed).integers(0, 256, (rows, *shape[1:], np.dtype(dtype).itemsize), np.uint8)
    array = (array & 1).astype(bool)[..., 0] if dtype is np.bool_ else array.view(dtype)[..., 0]
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    path = tmp_path_factory.mktemp("cache") / "writer.h5"
    with Writer(path, Provenance({"k": [1, "é"]}), chunk_bytes) as writer:
        for part in np.split(array, cuts):
            writer.append("group/x", part)
        writer.put("y", array[:7])
    with Reader(path, Provenance({"k": (1, "é")})) as reader:
        found = reader["group/x"]
        assert (found.dtype, found.shape, len(found)) == (array.dtype, array.shape, rows)
        assert found[:].tobytes() == array.tobytes() and reader["y"][:].tobytes() == array[:7].tobytes()
        size = data.draw(st.integers(1, 50))
        for i, batch in enumerate(reader.batches("group/x", size)):
            assert batch.tobytes() == array[i * size : (i + 1) * size].tobytes()
        key = data.draw(hnp.basic_indices(array.shape, allow_ellipsis=False, allow_newaxis=False)) or slice(None)
        assert np.asarray(found[key]).tobytes() == np.asarray(array[key]).tobytes()
    with h5py.File(path) as file:  # HDF5 verifies our fletcher32
        assert file["group/x"].fletcher32 and file["group/x"][:].tobytes() == array.tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 4095, 4096, 4097, 262_144, 262_146, 600_001])
@pytest.mark.parametrize("fill", ["zero", "ones", "random", "last"])
def test_fletcher32(path: Path, size: int, fill: str) -> None:
    """Against HDF5's: 0 and 65535 are the same number to the sum, but not to HDF5."""
    raw = {"zero": np.zeros, "ones": lambda n, dtype: np.full(n, 255, dtype), "last": np.zeros}.get(
        fill, lambda n, dtype: np.random.default_rng(n).integers(0, 256, n, dtype)
    )(size, dtype=np.uint8)
    raw[-1] |= fill == "last"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=raw, chunks=(size,), fletcher32=True)
        expected = int.from_bytes(dataset.id.read_direct_chunk((0,))[1][-4:], "little")
    padded = np.zeros(-(-size // 4096) * 4096, np.uint8)
    padded[:size] = raw
    assert fletcher32(padded, size, np.empty((2, 64, 1024), np.uint32)) == expected


def test_text_and_metadata(path: Path) -> None:
    texts = ["", "Mary gave", "日本 ", "a\0b"] * 9
    with Writer(
        path, Provenance({"config": {"a": [None, 1.5]}, "big": list(range(50_000))}), chunk_bytes=100
    ) as writer:
        writer.put("prompts", texts)
        writer.put("none", [])
        writer.append("i", np.arange(36))
    with Reader(path) as reader:
        assert (
            reader["prompts"][:] == texts and reader["prompts"][2] == "日本 " and reader["prompts"][::-2] == texts[::-2]
        )
        assert reader["none"][:] == [] and reader.names == ["prompts", "none", "i"]
        assert reader.metadata["config"] == {"a": [None, 1.5]} and len(reader.metadata["big"]) == 50_000
        assert {"schema_version", "package_version", "h5py_version", "hdf5_version", "numpy_version"} < set(
            reader.metadata
        )
        for batch in reader.shuffled(["i", "prompts"], 5, seed=0):
            assert batch["prompts"] == [texts[i] for i in batch["i"]]
    with pytest.raises(ValueError, match="NUL"), Writer(path, Provenance()) as writer:
        writer.put("prompts", ["a\0"])


def test_tensors(path: Path) -> None:
    tensor = torch.randn(50, 3, 4)
    with Writer(path, Provenance(), chunk_bytes=100) as writer:
        writer.append("bf16", tensor.bfloat16().transpose(1, 2))
        writer.append("fp32", tensor.requires_grad_())
    with Reader(path) as reader:
        rows = reader["bf16"]
        assert rows.bfloat16 and not reader["fp32"].bfloat16
        assert torch.equal(to_torch(rows[:], rows.bfloat16), tensor.bfloat16().transpose(1, 2))
        array = reader["fp32"][:]
        assert torch.equal(to_torch(array), tensor) and to_torch(array).data_ptr() == array.ctypes.data


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    numbered(tmp_path / "a.h5", 777, x=9)
    numbered(tmp_path / "b.h5", 777, x=9)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 4), np.float32),
        np.zeros((2, 3), np.float64),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        np.zeros((0, 5), np.float32),
    ],
)
def test_rows_of_another_shape_or_dtype(path: Path, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="x: rows"):
        write(path, ("x", np.zeros((2, 3), np.float32)), ("x", rows))
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("rows", [np.zeros(()), np.zeros((3, 0)), np.array(["a"]), np.array([None])])
def test_what_cannot_be_stored(path: Path, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot store"), Writer(path, Provenance()) as writer:
        writer.put("x", rows)


def test_taken_names(path: Path) -> None:
    with pytest.raises(ValueError, match="complete"):
        Writer(path, Provenance({"complete": 1}))
    with pytest.raises(ValueError, match="checksums/a: the group is taken"):
        write(path, ("checksums/a", np.zeros(3)))
    with Writer(path, Provenance()) as writer:
        writer.put("x", np.zeros(3))
        with pytest.raises(ValueError, match="x: written twice"):
            writer.put("x", np.zeros(3))


# --- memory


def test_memory_is_bounded(path: Path) -> None:
    rows = np.zeros((1024, 256), np.float32)  # 1 MiB; 64 of them
    chunk = 2**18
    tracemalloc.start()
    with Writer(path, Provenance(), chunk_bytes=chunk) as writer:
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(64):
            writer.append("x", rows)
        assert tracemalloc.get_traced_memory()[1] - start < 3 * chunk
    with Reader(path) as reader:
        for batches, bound in (
            (reader.batches("x", 100), 2 * READ_BYTES + 2 * chunk),
            (reader.shuffled("x", 100, seed=0, buffer_bytes=2**22), 2**22 + 4 * chunk),
            (reader.shuffled("x", 100, seed=0, buffer_bytes=1), 4 * chunk),
        ):
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            assert sum(len(batch) for batch in batches) == 2**16
            assert tracemalloc.get_traced_memory()[1] - start < bound
    tracemalloc.stop()


# --- refusals


def test_refusals_name_path_and_cause(path: Path) -> None:
    with pytest.raises(UserError, match=r"writer\.h5: not found"):
        Reader(path)
    numbered(path, 100, x=3, y=1)
    with pytest.raises(UserError, match=r"writer\.h5: model_hash: found 'm', expected 'other'"):
        Reader(path, Provenance({"model_hash": "other"}))
    with pytest.raises(UserError, match=r"writer\.h5: prompts_hash: found None, expected 'p'"):
        Reader(path, Provenance({"prompts_hash": "p"}))
    with (
        Reader(path, Provenance({"model_hash": "m"})) as reader,
        pytest.raises(UserError, match=r"writer\.h5: dataset 'z': not found.*'x', 'y'"),
    ):
        reader["z"]
    with h5py.File(path, "a") as file:
        del file.attrs["complete"]
    with pytest.raises(UserError, match="unfinished"):
        Reader(path)
    with h5py.File(path, "a") as file:
        file.attrs["schema_version"] = np.bytes_(b"99")
    with pytest.raises(UserError, match=r"writer\.h5: schema_version: found 99, expected 1"):
        Reader(path)
    path.write_text("not HDF5")
    with pytest.raises(UserError, match=r"writer\.h5: truncated or damaged"):
        Reader(path)
    with h5py.File(path, "w") as file:
        file.attrs["schema_version"] = "1"  # of another program
    with pytest.raises(UserError, match=r"writer\.h5: schema_version: found None"):
        Reader(path)


def test_locks_do_not_matter(path: Path) -> None:
    """Some network disks cannot lock, and finished files never change."""
    numbered(path, 10, x=1)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        Reader(path).close()


def test_datasets_changed_behind_the_manifest(path: Path) -> None:
    numbered(path, 100, x=3, y=3)
    for change in ("shape", "swap"):
        copy = path.with_name(f"{change}.h5")
        shutil.copy(path, copy)
        with h5py.File(copy, "a") as file:
            if change == "shape":
                file["x"].resize(99, axis=0)
            else:
                file.move("x", "z"), file.move("checksums/y", "x")
        with pytest.raises(UserError, match="truncated or damaged"):
            Reader(copy)


def test_other_lengths_are_not_aligned(path: Path) -> None:
    with Writer(path, Provenance()) as writer:
        writer.put("x", np.zeros(3))
        writer.put("y", np.zeros(4))
    with Reader(path) as reader:
        for iterate in (lambda: reader.batches(["x", "y"], 2), lambda: reader.shuffled(["x", "y"], 2, seed=0)):
            with pytest.raises(UserError, match="lengths"):
                iterate()


def contents(path: Path) -> dict:
    with Reader(path, Provenance({"model_hash": "m"})) as reader:
        return {**reader.metadata, **{name: np.asarray(reader[name][:]).tobytes() for name in reader.names}}


def test_truncated(path: Path) -> None:
    numbered(path, 500, x=10, y=1)
    whole = path.read_bytes()
    for size in [0, 1, 47, 48, 100, 512, 2048, *np.linspace(3000, len(whole) - 1, 40).astype(int)]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"writer\.h5: truncated"):
            contents(path)


def test_truncated_after_opening(path: Path) -> None:
    numbered(path, 5000, x=10)
    with Reader(path) as reader:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(UserError, match=r"rows .* truncated"):
            reader["x"][:]


def test_flipped_bytes_never_give_other_data(path: Path) -> None:
    """Every 11th byte of a file of several chunks, groups and kinds."""
    with Writer(path, Provenance({"model_hash": "m", "config": {"a": 1}}), chunk_bytes=512) as writer:
        writer.append("train/x", np.random.default_rng(0).standard_normal((70, 8), dtype=np.float32))
        writer.append("train/i", np.arange(70))
        writer.put("prompts", [f"prompt {i}" for i in range(10)])
    whole, expected = path.read_bytes(), contents(path)
    refused = 0
    offsets = range(0, len(whole), 11)
    for at in offsets:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8 if at % 3 else 255
        path.write_bytes(damaged)
        try:
            assert contents(path) == expected, f"byte {at} of {len(whole)} flipped unnoticed"
        except UserError:
            refused += 1
    assert refused > len(offsets) / 4  # the others: unused space, padding, fletcher32's own bytes


@pytest.mark.parametrize("kind", ["flip", "zero page", "swap pages", "0 to 65535"])
def test_damaged_rows_are_named(path: Path, kind: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, (64, 4096), np.uint8)
    data[33, :2] = 0
    with Writer(path, Provenance(), chunk_bytes=2**15) as writer:
        writer.append("x", data)
    with h5py.File(path) as file:
        at = file["x"].id.get_chunk_info(4).byte_offset + 4096  # row 33
    whole = bytearray(path.read_bytes())
    page, after = whole[at : at + 4096], whole[at + 4096 : at + 8192]
    damage = {
        "flip": bytes([page[0] ^ 16]),
        "zero page": bytes(4096),
        "swap pages": after + page,
        "0 to 65535": b"\xff\xff",
    }[kind]
    whole[at : at + len(damage)] = damage
    path.write_bytes(whole)
    with Reader(path) as reader:
        assert np.array_equal(reader["x"][:32], data[:32]) and np.array_equal(reader["x"][40:], data[40:])
        for read in (
            lambda: reader["x"][33],
            lambda: reader["x"][:],
            lambda: list(reader.batches("x", 5)),
            lambda: list(reader.shuffled("x", 5, seed=0)),
        ):
            with pytest.raises(UserError, match=r"writer\.h5: x, rows 32 to 39: damaged, found checksum"):
                read()


# --- interrupted and failed writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_exception_leaves_nothing(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match="mine"):
        write(path, ("x", np.zeros((100, 10))), error=error("mine"))
    assert not list(path.parent.iterdir())


def test_ctrl_c_at_any_moment(path: Path) -> None:
    """A timer plays Ctrl-C; the file is absent or complete, never in between."""
    rows, interrupted = np.arange(40_000, dtype=np.int32).reshape(-1, 100), 0
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for delay in np.linspace(0.0002, 0.02, 60):
            try:
                with Writer(path, Provenance({"model_hash": "m"}), chunk_bytes=4000) as writer:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    for _ in range(3):
                        writer.append("x", rows)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            left = list(path.parent.iterdir())
            if left not in (
                [],
                [path],
            ):  # a Ctrl-C in the few microseconds around __enter__ and __exit__ leaves cleaning to the collector
                gc.collect()
                left = list(path.parent.iterdir())
            assert left in ([], [path])
            if left:
                assert contents(path)["x"] == rows.tobytes() * 3
                path.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from oacore.store.provenance import Provenance
from oacore.store.writer import Writer
from oacore.errors import UserError

path = Path(sys.argv[1])
limits = [0, 50, 3000, 100_000, 1_000_000]
def write():
    with Writer(path, Provenance({"config": "c" * 30_000}), chunk_bytes=2**16) as writer:
        for done[0] in range(30):
            writer.append("x", np.ones((100, 100), np.float32))
done = [0]
write()
size = path.stat().st_size
path.unlink()
for limit in [*limits, *range(size - 100_000, size, 9000), size - 1]:  # the last fail while HDF5 closes the file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write()
        print("not refused at", limit)
    except UserError as error:
        assert str(error) == f"{path}: cannot write: File too large", error
    assert not list(path.parent.iterdir()), limit
    assert done[0] <= 1 + limit // 40_000, "should fail at once, not at the end"
fds = Path("/proc/self/fd")
open_files = [link.readlink().name for link in fds.iterdir() if link.is_symlink()] if fds.exists() else []
print("done", [name for name in open_files if "writer" in name])
"""


def test_disk_full(path: Path) -> None:
    """A file size limit plays the full disk (it needs no privileges). HDF5 alone would die of SIGSEGV when the process
    ends.
    """
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done []\n"), done.stderr


def test_sink_keeps_the_first_error(path: Path) -> None:
    with writer._Sink(path, "w+") as sink:
        assert sink.write(b"abc") == 3
        sink.truncate(-1)
        assert isinstance(sink.error, OSError) and sink.write(b"def") == 3 and sink.truncate(100) == 100
    assert path.read_bytes() == b"abc"


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"writer\.h5: cannot write"),
        Writer(tmp_path / "file" / "writer.h5", Provenance()),
    ):
        pass


def test_fsync_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks that allocate late report that they are full only here."""

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(UserError, match=r"writer\.h5: cannot write: No space left on device"),
        Writer(path, Provenance()) as writer,
    ):
        writer.put("x", np.zeros(3))
    assert not list(path.parent.iterdir())


# --- shuffled


@pytest.mark.parametrize(
    ("rows", "size", "buffer"),
    [(5000, 64, 2**15), (5000, 7, 1), (999, 1000, 2**26), (1, 3, 1), (0, 3, 1), (4096, 512, 2**14)],
)
def test_shuffled_covers_every_row_once(path: Path, rows: int, size: int, buffer: int) -> None:
    numbered(path, rows, chunk_bytes=1000, wide=50, narrow=1, middle=7)
    names = ["narrow", "wide", "middle"]
    with Reader(path) as reader:
        chunks = {reader[name].chunk_rows for name in names}
        assert rows < 1000 or chunks == {4, 32, 128}  # powers of two: they nest
        batches = list(reader.shuffled(names, size, seed=3, epochs=2, buffer_bytes=buffer))
        again = list(reader.shuffled("narrow", size, seed=4, buffer_bytes=buffer))
    for batch in batches:
        assert all((batch[name] == batch["narrow"][:, :1]).all() for name in names)
    lengths = [len(batch["wide"]) for batch in batches]
    full, rest = divmod(rows, size)
    assert lengths == 2 * ([size] * full + [rest] * (rest > 0))
    order = np.concatenate([batch["narrow"][:, 0] for batch in batches]) if rows else np.zeros(0, int)
    first, second = np.split(order, 2)
    assert np.array_equal(np.sort(first), np.arange(rows)) and np.array_equal(np.sort(second), np.arange(rows))
    if rows > 1:
        other = np.concatenate(again)[:, 0]
        assert (
            not np.array_equal(first, np.arange(rows))
            and not np.array_equal(first, second)
            and not np.array_equal(first, other)
        )


def test_shuffled_is_deterministic_and_mixes(path: Path) -> None:
    numbered(path, 8192, chunk_bytes=400, x=10)  # 1024 chunks of 8 rows
    with Reader(path) as reader:
        order = [np.concatenate(list(reader.shuffled("x", 64, seed=1, buffer_bytes=2**16)))[:, 0] for _ in range(2)]
    assert np.array_equal(*order)
    batches = order[0].reshape(-1, 64)
    assert (
        np.mean([len(set(batch // 128)) for batch in batches]) > 10
    )  # a batch has rows of many blocks (1/16 of the buffer each)
    assert abs(np.corrcoef(order[0], np.arange(8192))[0, 1]) < 0.3
    assert np.mean(np.diff(order[0]) == 1) < 0.02


def test_a_dropped_iterator_leaves_nothing_open(path: Path) -> None:
    numbered(path, 5000, x=10)
    threads = threading.active_count()
    with Reader(path) as reader:
        for iterator in (reader.shuffled("x", 10, seed=0), reader.batches("x", 1000)):
            next(iterator)
            assert threading.active_count() == threads
        del iterator
        file = reader._file
    assert file.closed
    file = weakref.ref(Reader(path)["x"]._file)  # dropped, not closed
    assert file() is None


def test_out_must_fit(path: Path) -> None:
    numbered(path, 100, x=4)
    with Reader(path) as reader:
        for out in (
            np.empty((9, 4), np.int32),
            np.empty((10, 4), np.float32),
            np.empty((4, 10), np.int32).T,
            np.empty((20, 4), np.int32)[::2],
        ):
            with pytest.raises(ValueError, match="x: out is"):
                reader["x"].read(5, 15, out)


def test_iterators_of_one_reader_do_not_disturb_each_other(path: Path) -> None:
    numbered(path, 5000, x=10)
    with Reader(path) as reader:
        results: dict[int, np.ndarray] = {}

        def read(size: int) -> None:
            results[size] = np.concatenate(list(reader.batches("x", size)))

        threads = [threading.Thread(target=read, args=(size,)) for size in (3, 50, 77)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(results[size][:, 0], np.arange(5000)) for size in (3, 50, 77))
