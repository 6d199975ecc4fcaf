"""The one exception that users see as a message instead of a traceback."""


class UserError(Exception):
    """Bad input: config, file, model or prompt.

    The message names the key or path, the value found and what is allowed, in that order.
    The command line and the workflow scripts print it alone and exit with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on a GPU or a CPU, or Python ran out of memory."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def cause(error: BaseException) -> str:
    """Why it happened, in one line: what the system says, else the message's first line."""
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
