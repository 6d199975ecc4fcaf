"""Draw what is forgotten against what is kept, from the tables of all methods."""

import pandas as pd

from oacore.config.run import Config
from oacore.inputs import provenance_of_several
from oacore.jobs import Files
from oacore.removal.plots import TYPES, removal_figures
from oacore.report.figures import save
from oacore.store.artefacts import read_table, write_table


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write front.csv of all methods and ablation types, and the figures."""
    assert config.removal is not None
    provenance = provenance_of_several(config, inputs["model"], "removal", config.removal.tasks())
    fronts = [read_table(path, provenance, dtype=TYPES) for path in inputs.all("fronts")]
    front = pd.concat(fronts, ignore_index=True)
    write_table(outputs["front"], front, provenance)
    figures = removal_figures(front)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
