"""Hashes of the contents of files and folders: of a model's directory, or of a task's data.

The Snakefile asks at every start and every job again, so large files are hashed once and remembered in the user's cache
directory, by size, inode and times. Sampling a file instead missed edits: with one matrix of a GPT-2 zeroed it was the
same model. The time of the inode's last change, which no tool sets back, tells even an edit that keeps the other times.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from oacore.progress import progress
from oacore.store.atomic import atomic_path

REMEMBERED_FROM = 1 << 20  # bytes: smaller files are hashed as fast as looked up
SETTLED = 2.0  # seconds since a file's last change before it is remembered: edits within a clock's tick have one time
_MB = 10**6
_BLOCK, _SHOWN_FROM = 16 * _MB, 1000 * _MB  # bytes: read at once; so many take about a second

_Memory = dict[str, list[object]]  # resolved path: size, inode, times of modification and change in ns, digest


def fingerprint(path: str | Path) -> str:
    """Hash of a file's or directory's names and contents. Hidden files do not count.

    Neither place nor time counts, so a copy or a checkout is the same.
    """
    path = Path(path).expanduser()
    single = path.is_file()
    files = [path] if single else sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item, path))
    memory = _recall() if any(file.stat().st_size >= REMEMBERED_FROM for file in files) else {}
    before = dict(memory)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{'' if single else file.relative_to(path).as_posix()} {_digest(file, memory)}\n".encode())
    if memory != before:
        _remember(memory)
    return digest.hexdigest()


def _hidden(item: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in item.relative_to(root).parts)


def _digest(file: Path, memory: _Memory) -> str:
    """sha256 of a file's bytes, from memory if it is unchanged."""
    stat, key = file.stat(), str(file.resolve())
    state: list[object] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    known = memory.get(key)
    if known is not None and known[:-1] == state:
        return str(known[-1])
    digest = hashlib.sha256()
    what = f"hashing {file.name}" if stat.st_size >= _SHOWN_FROM else ""
    with open(file, "rb") as handle, progress(what=what, unit="MB", total=stat.st_size // _MB) as bar:
        while block := handle.read(_BLOCK):
            digest.update(block)
            bar.update(len(block) // _MB)
    if stat.st_size >= REMEMBERED_FROM and time.time() - max(stat.st_mtime, stat.st_ctime) >= SETTLED:
        memory[key] = [*state, digest.hexdigest()]
    return digest.hexdigest()


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "oacore" / "fingerprints.json"


def _recall() -> _Memory:
    try:
        memory = dict(json.loads(_file().read_text()))
    except (OSError, ValueError, TypeError, RuntimeError):  # none yet, damaged, or no home: all are hashed
        return {}
    return {path: known for path, known in memory.items() if isinstance(known, list)}


def _remember(memory: _Memory) -> None:
    """Write it without what is gone. Of two processes at once one is forgotten, and hashes again."""
    try:
        with atomic_path(_file()) as temporary:
            temporary.write_text(json.dumps({path: known for path, known in memory.items() if Path(path).exists()}))
    except (OSError, RuntimeError) as error:
        print(f"warning: large files are hashed at every start: can't remember their hashes: {error}", file=sys.stderr)
