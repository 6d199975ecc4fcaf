"""What tasks that read a file of the user's share: its rows, dealing them out to splits, a subject's tokens."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from oacore.errors import UserError
from oacore.tasks.prompts import SPLITS, ids_and_offsets, read_text

Key = TypeVar("Key")
SHOWN = 10  # bad rows of one message


def rows(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """(place in the file, row) of every row of a CSV file with a header, of JSON lines, or of a JSON list; a line that
    is not JSON is None.

    Raises:
        UserError: naming `key`, for a file that is none of these.
    """
    text = read_text(path, key)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(
            io.StringIO(text), strict=True
        )  # or a quote that is never closed takes all rows after it
        try:
            names = [name for name in reader.fieldnames or () if name]
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise UserError(f"{key}: {path} has the column {', '.join(twice)} twice; allowed: once")
            yield from ((f"line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise UserError(f"{key}: {path} is not CSV: after line {reader.line_num}: {error}") from None
    elif text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: {path} is not JSON: {error}") from None
        yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
    elif text.lstrip().startswith("{") and _is_json(text):
        raise UserError(
            f"{key}: {path} is one JSON object over several lines; allowed: a JSON list, or one object on each line"
        )
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError:
                    yield f"line {number}", None


def _is_json(text: str) -> bool:
    """Whether it is one object as a whole, on more than one line."""
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def bad_rows(key: str, path: Path, bad: Sequence[str], allowed: str) -> UserError:
    """What is wrong with a file's rows, of which the first ten are listed."""
    return UserError(f"{key}: {path} has {len(bad)} bad rows ({allowed}): {'; '.join(bad[:SHOWN])}")


def deal(strata: dict[Key, tuple[str, ...]], seed: int) -> dict[Key, str]:
    """Keys to splits, 60/20/20 in random order, stratum by stratum."""
    keys = list(strata)
    shuffled = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    train, validation, test = SPLITS
    hand = (train, test, validation, train, train)  # three keys are enough for all splits
    return {key: hand[i % len(hand)] for i, key in enumerate(sorted(shuffled, key=strata.__getitem__))}


def subject_span(tokenizer: Any, text: str, subject: str) -> tuple[int, int]:
    """The half-open span of positions, after BOS, of every token that covers one of the characters of the subject's
    first occurrence.
    """
    start = text.index(subject)
    end = start + len(subject)
    # Overlap, not equality: the first token also covers the space before it. Positions are one higher for BOS.
    inside = [i for i, (a, b) in enumerate(ids_and_offsets(tokenizer, text)[1], 1) if a < end and b > start]
    return inside[0], inside[-1] + 1
