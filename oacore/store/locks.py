"""Who may write: one pipeline at a time in a results folder and in an unfinished cache, one job at a time on a GPU.

Locks are advisory (flock) on hidden files, held until the process ends: the kernel drops them however it ends, so a
killed run blocks nobody. Snakemake's own lock covers one working directory only, makes a second run fail instead of
wait, and outlives a kill.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from oacore.errors import UserError, cause
from oacore.store.atomic import atomic_path
from oacore.store.codehash import codehash
from oacore.store.layout import Layout, short_hash

CACHE_STAGES = ("demo", "model", "prompts", "activations", "lens_activations", "vision_model")
SECONDS_BETWEEN_TRIES = 0.5
_held: list[IO[str]] = []  # open files hold locks; these live as long as the process


def hold(path: str | Path, what: str, *, shared: bool = False, wait: bool = True) -> IO[str] | None:
    """Lock a file until the process ends, or until the returned file is closed; says whom it waits for.

    None for a shared lock where nobody can write: nothing changes there.

    Raises:
        UserError: another process holds it and `wait` is False, or it can't be made.
    """
    path = Path(path)
    try:
        file = _opened(path)
    except OSError as error:
        if shared and error.errno == errno.EROFS:
            return None
        raise UserError(
            f"{path}: can't be written: {cause(error)}; allowed: a folder that this run may write"
        ) from None
    said = False
    while not _try(file, shared):
        if not wait:
            raise UserError(f"{path}: held by {_holder(file)}; allowed: when that has ended")
        if not said:
            print(f"{what} is in use by {_holder(file)}: waiting until it has ended", file=sys.stderr, flush=True)
            said = True
        time.sleep(SECONDS_BETWEEN_TRIES)
    if not shared and file.writable():
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "command": " ".join(sys.argv)}))
        file.flush()
    _held.append(file)
    return file


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="utf-8")  # stays open: that is the lock
    except OSError as error:
        # Another user's, in a shared cache, or on a read-only mount: only the holder's name needs the right to write.
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and path.exists():
            return open(path, encoding="utf-8")
        raise


def _try(file: IO[str], shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some cluster file systems have no locks
        print(
            f"{file.name}: no file locks here ({error.strerror}): see to it that only one run writes there",
            file=sys.stderr,
        )
    return True


def _holder(file: IO[str]) -> str:
    """Who wrote its name into a lock file: the last one who held it alone."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} ({holder['command'][-100:]})"


def hold_for_pipeline(layout: Layout, *, wait: bool = True) -> None:
    """Keep other pipelines out of this run's results, and out of its cache unless that is complete and nobody will
    write to it.

    Jobs that a killed pipeline left running end first. To be called before Snakemake looks at any file, or it would
    plan by what is there before the wait.

    Raises:
        UserError: something is held and `wait` is False.
    """
    of_cache = "shared" if cache_is_complete(layout) else "exclusive"
    folders = {layout.results_dir: "exclusive"} | dict.fromkeys(layout.cache_folders, of_cache)
    for folder, mode in folders.items():
        hold(f"{folder}/.lock", folder, shared=mode == "shared", wait=wait)
        if mode == "exclusive":
            jobs = hold(f"{folder}/.jobs.lock", f"{folder} (a job)", wait=wait)
            assert jobs is not None
            jobs.close()


@contextmanager
def holding_for_pipeline(layout: Layout) -> Iterator[None]:
    """`hold_for_pipeline` within, for a process that lives on, such as a notebook's."""
    n_before = len(_held)
    try:
        hold_for_pipeline(layout)
        yield
    finally:
        while len(_held) > n_before:
            _held.pop().close()


def hold_for_job(layout: Layout) -> None:
    """Make pipelines that want to write where this job writes wait for its end, should its own pipeline be killed."""
    for folder in (layout.results_dir, *layout.cache_folders):
        hold(f"{folder}/.jobs.lock", folder, shared=True)


def cache_is_complete(layout: Layout) -> bool:
    """Whether all that this config caches is there, written or found fresh by a pipeline with today's code."""
    mark = Path(layout.model_dir) / ".complete"
    return (
        all(Path(file).exists() for file in layout.cache_files())
        and mark.exists()
        and mark.read_text() == _cache_code()
    )


def cache_is_outdated(layout: Layout) -> bool:
    """Whether the last pipeline that found all of its cache there was of other code than today's."""
    mark = Path(layout.model_dir) / ".complete"
    return mark.exists() and mark.read_text() != _cache_code()


def mark_cache_complete(layout: Layout) -> None:
    """Let pipelines share the cache from now on; called after one has succeeded."""
    files = layout.cache_files()
    if files and not cache_is_complete(layout) and all(Path(file).exists() for file in files):
        with atomic_path(Path(layout.model_dir) / ".complete") as temporary:
            temporary.write_text(_cache_code())


def _cache_code() -> str:
    return short_hash([codehash(f"oacore.stages.{stage}") for stage in CACHE_STAGES])


def hold_gpu(device: str, n_gpus: int | None = None) -> None:
    """Take a GPU that no other job of this user has, and show this process no other one. Snakemake counts GPUs but
    assigns none.

    Nothing is done on the CPU, and under SLURM, which assigns them. To be called before CUDA starts.

    Args:
        n_gpus: how many there are; counted if None.
    """
    if device == "cpu" or "SLURM_JOB_ID" in os.environ:
        return
    if n_gpus is None:
        import torch

        n_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(n_gpus)]
    folder = Path(tempfile.gettempdir()) / f"oacore-{os.getuid()}"
    said = False
    while names:
        for name in names:
            try:
                hold(folder / f"gpu-{name}.lock", f"GPU {name}", wait=False)
            except UserError:
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return
        if not said:
            print(
                f"all GPUs ({', '.join(names)}) are in use by other jobs: waiting for one", file=sys.stderr, flush=True
            )
            said = True
        time.sleep(SECONDS_BETWEEN_TRIES)
