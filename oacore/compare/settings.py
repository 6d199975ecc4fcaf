"""What differs in the settings of two runs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from oacore.config.run import Config

PLACES = ("run", "cache_dir", "results_dir", "compare")  # where a run lies and stands, not what it is


def settings_that_differ(first: Config, second: Config) -> pd.DataFrame:
    """Keys of the configs with other values; columns key, first, second."""
    flat = [_flat(config.model_dump(mode="json", exclude=set(PLACES))) for config in (first, second)]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)]
    values = ([str(of.get(key, "–")) for key in keys] for of in flat)
    return pd.DataFrame({"key": keys, **dict(zip(("first", "second"), values, strict=True))})


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else name
        flat |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return flat
