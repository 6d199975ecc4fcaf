"""From keywords to a config, whose run is named by all that determines its results."""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oacore.config.ablation import ABLATION_TYPES
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.config.read import input_files, parse_config
from oacore.config.run import Config
from oacore.store.codehash import codehash, every_module
from oacore.store.fingerprint import fingerprint
from oacore.store.layout import Layout, short_hash
from oacore.tasks.generate import check_files

RUN = "api"  # what the names of all runs begin with, and the name of one that has no results
NO_ABLATION: Mapping[str, Any] = {"tasks": []}  # single components are ablated unless a config says so


def config_of(
    settings: Mapping[str, Any], tasks: Mapping[str, Any], ablation: Mapping[str, Any] = NO_ABLATION, **sections: Any
) -> Config:
    """The config of one experiment. Its results folder is its own, so that what is there is never stale.

    Args:
        settings: of the model, at the top level of the config.
        sections: `circuits`, `interactions`, `removal`, `tracing`, `lenses` or `vision`.

    Raises:
        UserError: as the pipeline's, by the keys of the config.
    """
    config = parse_config({**settings, "run": RUN, "tasks": tasks, "ablation": ablation, **sections})
    check_files(config)
    has_results = bool(sections) or ablation is not NO_ABLATION
    return config.model_copy(update={"run": f"{RUN}-{_identity(config)}"}) if has_results else config


def _identity(config: Config) -> str:
    """A hash of the settings, of the contents of the files that they name, of our code and of PyTorch's release."""
    layout = Layout(config)
    files = {key: fingerprint(path) for key, path in input_files(config)}
    contents = [Path(layout.model_dir).name, layout.task_folders, files]
    return short_hash([config.model_dump(mode="json"), contents, _code(), version("torch")])


@cache
def _code() -> str:
    return codehash(*every_module())


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None: a key that is not given has the config's default."""
    return {key: value for key, value in values.items() if value is not None}


def constants_for(
    methods: Iterable[str], ablations: Iterable[str], optimal: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The section `ablation` of an experiment on circuits: the components' constants, for methods that take them."""
    rows = [CIRCUIT_METHODS[method] for method in methods if method in CIRCUIT_METHODS]
    taken = [
        name
        for name in ablations
        if name in EDGE_ABLATIONS and EDGE_ABLATIONS[name].fitted and any(row.takes_constants for row in rows)
    ]
    if not taken:
        return {**NO_ABLATION, **given(optimal=optimal)}
    fitted = [part for name in taken for part in (ABLATION_TYPES[name].starts_from, name) if part]
    return {"methods": list(dict.fromkeys(fitted)), **given(optimal=optimal)}
