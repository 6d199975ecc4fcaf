"""What differs in the settings of two runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from oacore.config.run import Config

PLACES = ("run", "cache_dir", "results_dir", "compare")  # where a run lies and stands, not what it is
ABSENT, GIVEN = "–", "given"  # a key, and a whole section, that one of them alone has


def settings_that_differ(first: Config, second: Config) -> pd.DataFrame:
    """Keys of the configs with other values; columns key, first, second. A section that one lacks is one row."""
    ours, theirs = (config.model_dump(mode="json", exclude=set(PLACES)) for config in (first, second))
    return pd.DataFrame(list(_different(ours, theirs)), columns=["key", "first", "second"])


def _different(first: Mapping[str, Any], second: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*first, *second]):
        values, key = (first.get(name, ABSENT), second.get(name, ABSENT)), f"{path}{name}"
        if all(isinstance(value, Mapping) for value in values):
            yield from _different(*values, f"{key}.")
        elif values[0] != values[1]:
            shown = (GIVEN if isinstance(value, Mapping) else str(value) for value in values)
            yield key, next(shown), next(shown)
