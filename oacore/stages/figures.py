"""Draw a task's ablation figures from its tables."""

import pandas as pd

from oacore import plots
from oacore.artefacts import read_table
from oacore.config import Config
from oacore.constants import load_curves
from oacore.layout import Layout
from oacore.stages.common import need, origin


def run(config: Config, task: str) -> None:
    """Write every figure as SVG and PNG."""
    layout = Layout(config)
    belongs = origin(layout, task)
    gaps = read_table(need(layout.ablation(task, "gaps.csv"), "gaps"), belongs, dtype={"head": "Int64"})
    curves = [load_curves(need(layout.constants(task, method), "optimal"), method, belongs) for method in config.ablation.fitted()]
    figures = plots.ablation_figures(gaps, pd.concat(curves, ignore_index=True) if curves else None)
    for name, figure in figures.items():
        plots.save(figure, layout.ablation(task, name), belongs)
