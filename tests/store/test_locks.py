"""Who may write: locks between processes, real ones."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.store import locks
from oacore.store.atomic import atomic_directory, atomic_path
from oacore.store.layout import Layout

PIPELINE = """
import sys
from pathlib import Path
from oacore.store import locks
from oacore.config.read import parse_config
from oacore.store.layout import Layout
run, cache, results, wait, started, stop = sys.argv[1:]
config = parse_config({"run": run, "model": "demo", "tasks": {"ioi": {}}, "cache_dir": cache, "results_dir": results})
locks.hold_for_pipeline(Layout(config), wait=wait == "wait")
Path(started).touch()
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that locks like a pipeline and holds its locks until it is killed; `.started` says that it has
    them.
    """
    processes = []

    def begin(run, wait="wait"):
        started = tmp_path / f"{run}-{len(processes)}.started"
        arguments = [run, str(tmp_path / "cache"), str(tmp_path / "results"), wait, str(started), ""]
        process = subprocess.Popen(
            [sys.executable, "-c", PIPELINE, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.started = started
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def layout_of(tmp_path, run):
    values = {
        "run": run,
        "model": "demo",
        "tasks": {"ioi": {}},
        "cache_dir": tmp_path / "cache",
        "results_dir": tmp_path / "results",
    }
    return Layout(parse_config(values))


def complete_cache(tmp_path):
    layout = layout_of(tmp_path, "a")
    for file in layout.cache_files():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    locks.mark_cache_complete(layout)
    assert locks.cache_is_complete(layout)
    return layout


@pytest.mark.parametrize("second", ["a", "b"])
def test_a_second_pipeline_waits_and_a_kill_frees_it(start, tmp_path, second):
    """One results folder, or two with one unfinished cache; SIGKILL leaves no lock behind."""
    first = start("a")
    until(first.started.exists)
    other = start(second)
    line = other.stderr.readline()
    assert f"in use by process {first.pid} on " in line and "waiting" in line
    assert not other.started.exists()
    first.kill()
    until(other.started.exists)


def test_a_finished_cache_is_shared(start, tmp_path):
    complete_cache(tmp_path)
    first, second = start("a"), start("b")
    until(first.started.exists)
    until(second.started.exists)
    assert first.poll() is None


def test_a_cache_of_older_code_is_not_shared(start, tmp_path, monkeypatch):
    layout = complete_cache(tmp_path)
    assert not locks.cache_is_outdated(layout)
    monkeypatch.setattr(locks, "codehash", lambda module: "other")
    assert not locks.cache_is_complete(layout) and locks.cache_is_outdated(layout)


def test_unlock_is_refused_while_a_pipeline_runs(start, tmp_path):
    first = start("a")
    until(first.started.exists)
    with pytest.raises(UserError, match=rf"\.lock: held by process {first.pid} on "):
        locks.hold_for_pipeline(layout_of(tmp_path, "a"), wait=False)


def test_jobs_of_a_killed_pipeline_end_first(start, tmp_path):
    job = locks.hold(Path(layout_of(tmp_path, "a").results_dir) / ".jobs.lock", "job", shared=True)
    pipeline = start("a")
    assert "(a job) is in use" in pipeline.stderr.readline()
    assert not pipeline.started.exists()
    job.close()
    until(pipeline.started.exists)


def test_without_file_locks_it_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    locks.hold(tmp_path / ".lock", "here")
    assert "no file locks here (No locks available)" in capsys.readouterr().err


def test_another_user_s_lock_file_can_be_locked(tmp_path, monkeypatch):
    """A file that we may read only; as root that has to be made up."""
    path = tmp_path / ".lock"
    path.write_text("")
    opened = open

    def open_as_other(file, mode="r", **options):
        if "a" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(file, mode, **options)

    monkeypatch.setattr("builtins.open", open_as_other)
    held = locks.hold(path, "here")
    with pytest.raises(UserError, match="held by another process"):
        locks.hold(path, "here", wait=False)
    held.close()
    assert path.read_text() == ""


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """Make a folder a read-only mount; as root that has to be made up."""
    opened, made = open, Path.mkdir

    def refuse(path):
        if Path(path).is_relative_to(tmp_path / "cache"):
            raise OSError(errno.EROFS, "Read-only file system")

    def open_there(file, mode="r", **options):
        if mode != "r":
            refuse(file)
        return opened(file, mode, **options)

    def make_there(path, *arguments, **options):
        if not path.exists():
            refuse(path)
        made(path, *arguments, **options)

    def begin():
        monkeypatch.setattr("builtins.open", open_there)
        monkeypatch.setattr(Path, "mkdir", make_there)

    return begin


@pytest.mark.parametrize("locked_before", [True, False])
def test_a_complete_cache_on_a_read_only_mount_is_used(tmp_path, read_only, locked_before):
    layout = complete_cache(tmp_path)
    if locked_before:
        for name in (".lock", ".jobs.lock"):
            (Path(layout.model_dir) / name).write_text("")
    read_only()
    locks.hold_for_pipeline(layout)  # of one process, a job of another
    locks.mark_cache_complete(layout)
    held = locks.hold(f"{layout.model_dir}/.jobs.lock", "cache", shared=True, wait=False)
    assert (held is not None) == locked_before


def test_an_unfinished_cache_on_a_read_only_mount_is_one_error(tmp_path, read_only):
    layout = complete_cache(tmp_path)
    Path(layout.model_json).unlink()
    read_only()
    with pytest.raises(UserError, match=r"cache/.*\.lock: can't be written: Read-only file system; allowed: a folder"):
        locks.hold_for_pipeline(layout)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o007, 0o770), (0o002, 0o775)])
def test_folders_and_files_obey_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "inside").mkdir()
            (temporary / "inside/private").touch(0o600)
        with atomic_path(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder/inside").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder/inside/private").stat().st_mode & 0o777 == mode & 0o666
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode & 0o666


GPU = """
import os, sys
from oacore.store.locks import hold_gpu
hold_gpu("cuda", 2)
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def test_every_job_gets_a_gpu_of_its_own(tmp_path):
    """Two GPUs, three jobs: the third waits for whichever is free first."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
    }
    environment |= {"TMPDIR": str(tmp_path)}

    def job(**more):
        return subprocess.Popen(
            [sys.executable, "-c", GPU],
            env=environment | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, second = job(), job()
    taken = {first.stdout.readline().strip(): first, second.stdout.readline().strip(): second}
    assert set(taken) == {"0", "1"}
    third = job()
    assert "all GPUs (0, 1) are in use" in third.stderr.readline()
    taken["1"].kill()
    assert third.stdout.readline().strip() == "1"
    chosen = job(CUDA_VISIBLE_DEVICES="7")  # the user's choice is kept to
    assert chosen.stdout.readline().strip() == "7"
    for process in (first, second, third, chosen):
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("device", "slurm"), [("cpu", None), ("cuda", "12")])
def test_no_gpu_is_taken_on_a_cpu_or_under_slurm(monkeypatch, device, slurm):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", slurm)
    locks.hold_gpu(device, 2)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


WRITER = """
import sys, time
from oacore.store.atomic import atomic_directory, atomic_path
with (atomic_directory if sys.argv[2] == "folder" else atomic_path)(sys.argv[1]) as temporary:
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, kind):
    path = tmp_path / "table.csv"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    (left,) = tmp_path.iterdir()
    write = atomic_directory if kind == "folder" else atomic_path
    with write(path):
        assert left.exists(), "its writer lives"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert left.exists()
    with write(path):
        pass
    assert list(tmp_path.iterdir()) == [path]
