"""Draw where facts are recalled."""

import pandas as pd

from oacore import plots
from oacore.config import Config
from oacore.layout import Layout
from oacore.stages.common import need
from oacore.tracing_plots import tracing_figures


def run(config: Config) -> None:
    """Write every figure as SVG and PNG."""
    layout = Layout(config)
    aie, pictures = (pd.read_csv(need(layout.tracing(name), "tracing"), keep_default_na=False) for name in ("aie.csv", "pictures.csv"))
    for name, figure in tracing_figures(aie, pictures).items():
        plots.save(figure, layout.tracing(f"figures/{name}"))
