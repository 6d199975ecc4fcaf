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
    for name, figure in tracing_figures(pd.read_csv(need(layout.tracing("aie.csv"), "tracing")), read_pictures(layout)).items():
        plots.save(figure, layout.tracing(f"figures/{name}"))


def read_pictures(layout: Layout) -> pd.DataFrame:
    """pictures.csv, whose tokens may read "NA" or "null"."""
    return pd.read_csv(need(layout.tracing("pictures.csv"), "tracing"), keep_default_na=False)
