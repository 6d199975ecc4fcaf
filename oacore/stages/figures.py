"""Draw a task's ablation figures from its tables."""

import pandas as pd

from oacore.ablation.plots import ablation_figures
from oacore.config.run import Config
from oacore.fits.curves import read_curves
from oacore.inputs import provenance_of
from oacore.jobs import Files
from oacore.report.figures import save
from oacore.store.artefacts import read_table


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write every figure as SVG and PNG."""
    provenance = provenance_of(config, inputs["model"], task)
    gaps = read_table(inputs["gaps"], provenance, dtype={"head": "Int64"})
    curves = [
        read_curves(path, provenance)
        .rename(columns={"fit": "component", "validation_loss": "validation_gap_nats"})
        .assign(method=method)
        for method, path in zip(config.ablation.fitted(), inputs.all("constants"), strict=True)
    ]
    figures = ablation_figures(gaps, pd.concat(curves, ignore_index=True) if curves else None)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
