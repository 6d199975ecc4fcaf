"""Atomic files and folders: a reader sees the old content or the new one, never half of it."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was. What a killed process
    left behind is removed by the next one that writes the same path.
    The suffix is kept, because some writers (matplotlib, pandas) choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600: group members must read a shared cache
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place on success, its files with the umask's rights, which
    safetensors' have not; as `atomic_path` otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=path.suffix))
    try:
        yield temporary
        for item in (temporary, *temporary.rglob("*")):
            item.chmod((0o777 if item.is_dir() else 0o666) & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _prefix(path: Path) -> str:
    return f".{path.stem}-{socket.gethostname()}.{os.getpid()}-"


def _remove_left_behind(path: Path) -> None:
    """Remove temporaries of `path` whose process, on this host, is gone."""
    pattern = re.compile(re.escape(f".{path.stem}-{socket.gethostname()}.") + r"(\d+)-\w+" + re.escape(path.suffix))
    for other in path.parent.iterdir():
        if (match := pattern.fullmatch(other.name)) and not _is_alive(int(match[1])):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
