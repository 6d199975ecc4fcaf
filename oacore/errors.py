"""The one exception that users see as a message instead of a traceback."""

import errno
import os
import re


class UserError(Exception):
    """Bad input: config, file, model or prompt.

    The message names the key or path, the value found and what is allowed, in that order.
    The command line and the workflow scripts print it alone and exit with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on a GPU or a CPU, or Python ran out of memory."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


_ON_DISK = {
    errno.ENOSPC: "a disk with room",
    errno.EDQUOT: "a quota with room",
    errno.EROFS: "a folder that this run may write",
    errno.EACCES: "a folder that this run may write",
    errno.EPERM: "a folder that this run may write",
    errno.ENAMETOOLONG: "a shorter cache_dir, results_dir or run",
}
_IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors writes in Rust, and gives the system's error as text


def disk_error(error: BaseException) -> UserError | None:
    """One line for what only the user can mend on a disk, with the path where the error has one; None for any other
    error.
    """
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if type(error).__name__ == "SafetensorError" and (match := _IN_RUST.search(str(error))):
        number = int(match[1])
    if number not in _ON_DISK:
        return None
    where = f"{path}: " if path else ""
    return UserError(f"{where}can't be written: {os.strerror(number)}; allowed: {_ON_DISK[number]}")


def cause(error: BaseException) -> str:
    """Why it happened, in one line: what the system says, else the message's first line."""
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
