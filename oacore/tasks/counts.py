"""How many prompts a task takes of what a file of the user's has for each split."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from oacore.errors import UserError
from oacore.tasks.prompts import SPLITS


class FileSizes(NamedTuple):
    """What an estimate wants to know of a file."""

    n_train: int
    n_validation: int
    n_test: int
    longest: int  # tokens of the longest prompt with BOS, a word or punctuation mark for each


def spoken(text: str) -> int:
    """The words and punctuation marks of a text, about as many as its tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def counts(settings: Any, key: str, where: str, split_of: Iterable[str], what: str) -> dict[str, int]:
    """How many prompts to take of each split, of those that there are: of `n_train` and so on, numbers, shares or
    "all".

    Args:
        key: of the task in the config.
        where, what: of the file's name, and of what it has, for the message.
        split_of: the split of everything there is.

    Raises:
        UserError: what there is too little of, of all splits at once.
    """
    has = Counter(split_of)
    wanted: dict[str, Any] = {split: getattr(settings, f"n_{split}") for split in SPLITS}
    taken = {split: wanted_of(wanted[split], has[split]) for split in SPLITS}
    if beyond := [f"n_{split} {wanted[split]}" for split in SPLITS if not 2 <= taken[split] <= has[split]]:
        there = ", ".join(f"{has[split]} {split}" for split in SPLITS)
        raise UserError(
            f"{key}: {', '.join(beyond)} wanted; {where} has {there} {what}; allowed: at least 2 of each split, and at "
            "most what there is"
        )
    return taken


def wanted_of(wanted: Any, has: int) -> int:
    """How many prompts are wanted of those that there are: a number, a share, or all."""
    if wanted == "all":
        return has
    return wanted if isinstance(wanted, int) else round(wanted * has)
