"""Draw where facts are recalled."""

import pandas as pd

from oacore import plots
from oacore.artefacts import read_table
from oacore.config import Config
from oacore.layout import Layout
from oacore.stages.common import need, origin
from oacore.tracing_plots import tracing_figures


def run(config: Config) -> None:
    """Write every figure as SVG and PNG."""
    layout = Layout(config)
    for name, figure in tracing_figures(*read_tables(layout)).items():
        plots.save(figure, layout.tracing(f"figures/{name}"), origin(layout, "facts"))


def read_tables(layout: Layout) -> tuple[pd.DataFrame, pd.DataFrame]:
    """aie.csv, and pictures.csv, whose tokens may read "NA" or "null"."""
    aie, pictures = (need(layout.tracing(f"{name}.csv"), "tracing") for name in ("aie", "pictures"))
    belongs = origin(layout, "facts")
    return read_table(aie, belongs), read_table(pictures, belongs, keep_default_na=False)
