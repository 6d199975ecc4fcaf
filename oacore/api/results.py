"""What an experiment gives back: its tables as data frames, and its figures, which show themselves in a notebook."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from oacore.config.run import Config
from oacore.inputs import provenance_of, provenance_of_several
from oacore.jobs import files_of, planned
from oacore.running import run_behind
from oacore.store.artefacts import read_json, read_svg, read_table
from oacore.store.atomic import atomic_path
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance

DTYPES = {"head": "Int64", "converged": "boolean", "steps": "Int64"}  # of columns with empty cells


@dataclass(frozen=True, repr=False)
class Drawing:
    """A figure. A notebook shows it; `svg` is its text."""

    name: str
    svg: str

    def __repr__(self) -> str:
        return f"{self.name}.svg"

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the SVG document, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.svg, encoding="utf-8")


@dataclass(frozen=True, repr=False)
class Result:
    """Tables and figures of one experiment. A notebook shows its first table, which `table` is.

    Args:
        settings: the whole config.
        tables: by the names of their files, columns as the experiment's page has them; losses are in nats.
        figures: by the names of their files.
    """

    settings: Config
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Drawing]

    @property
    def table(self) -> pd.DataFrame:
        """The first of the tables."""
        return next(iter(self.tables.values()))

    @property
    def config(self) -> str:
        """The YAML file with which the pipeline computes the same, and finds it computed."""
        return yaml.safe_dump(self.settings.model_dump(mode="json", exclude_unset=True), sort_keys=False)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(Layout(self.settings).results_dir)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> Any:
        return self.table.to_html(max_rows=20)


def result_of(config: Config, *stages: str) -> Result:
    """Run what these stages need and is missing, and read what they wrote."""
    layout = run_behind(config, *stages)
    provenance = _provenance(config, Path(layout.model_json))
    files = [
        path
        for stage, wildcards in planned(config)
        if stage in stages
        for path in files_of(layout, stage, **wildcards)[1].every()
    ]
    tables = {path.stem: read(path, provenance) for path in files if path.suffix == ".csv"}
    figures = {path.stem: Drawing(path.stem, read_svg(path, provenance)) for path in files if path.suffix == ".svg"}
    return Result(config, tables, figures)


def _provenance(config: Config, model_json: Path) -> Provenance:
    """What the results of the one experiment of a config require."""
    if config.vision is not None:
        facts = read_json(Layout(config).vision_model("model.json"))
        return Provenance({name: facts[name] for name in ("model_hash", "images_hash")})
    if config.removal is not None:
        return provenance_of_several(config, model_json, "removal", config.removal.tasks())
    (task,) = config.tasks.selected()
    return provenance_of(config, model_json, task)


def read(path: Path, provenance: Provenance) -> pd.DataFrame:
    """A table of results."""
    tokens = path.stem == "pictures"  # they may read "NA" or "null"
    return read_table(path, provenance, **({"keep_default_na": False} if tokens else {"dtype": DTYPES}))
