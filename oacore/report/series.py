"""What a table shows, in the order in which it is always shown."""

from collections.abc import Iterable


def in_order(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Each value once: known ones in the order of `known`, such as a registry, and unknown ones last, as they come."""
    present = list(dict.fromkeys(values))
    order = list(known)
    return [name for name in order if name in present] + [name for name in present if name not in order]
