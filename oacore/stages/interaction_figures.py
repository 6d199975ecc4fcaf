"""Draw a task's effects, paths and interactions from the tables of all ablation types."""

import pandas as pd

from oacore.config.run import Config
from oacore.inputs import provenance_of
from oacore.interactions.plots import interaction_figures
from oacore.jobs import INTERACTION_TABLES, Files
from oacore.report.figures import save
from oacore.store.artefacts import read_table, write_table


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write effects.csv, paths.csv and interactions.csv of all ablation types, and the figures."""
    provenance = provenance_of(config, inputs["model"], task)
    tables = {
        name: pd.concat([read_table(path, provenance) for path in inputs.all(name)], ignore_index=True)
        for name in INTERACTION_TABLES
    }
    for name, table in tables.items():
        write_table(outputs[name], table, provenance)
    figures = interaction_figures(**tables)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
