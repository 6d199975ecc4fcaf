"""Draw the importances of a convolutional network's units, and how measures agree."""

import pandas as pd

from oacore.config.run import Config
from oacore.jobs import VISION_TABLES, Files
from oacore.report.figures import save
from oacore.store.artefacts import read_json, read_table, write_table
from oacore.store.provenance import Provenance
from oacore.vision.plots import vision_figures


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write the tables of all kinds of units, and the figures."""
    settings = config.vision
    assert settings is not None
    facts = read_json(inputs["model"])
    provenance = Provenance({name: facts[name] for name in ("model_hash", "images_hash")})
    tables = {}
    for name in VISION_TABLES:
        paths = zip(settings.units, inputs.all(name), strict=True)
        parts = [read_table(path, provenance.requiring(units=kind)) for kind, path in paths]
        # Without rows a column has no type of its own, and would take that of the others.
        tables[name] = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        write_table(outputs[name], tables[name], provenance)
    reference = f"shapley_{settings.replacements[0]}"
    figures = vision_figures(tables["importance"], tables["agreement"], tables["curves"], reference)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
