"""Draw where facts are recalled."""

from oacore.config.run import Config
from oacore.inputs import provenance_of
from oacore.jobs import Files
from oacore.report.figures import save
from oacore.store.artefacts import read_table
from oacore.tracing.plots import tracing_figures


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write every figure as SVG and PNG."""
    provenance = provenance_of(config, inputs["model"], task)
    aie = read_table(inputs["aie"], provenance)
    # Tokens may read "NA" or "null".
    pictures = read_table(inputs["pictures"], provenance, keep_default_na=False)
    figures = tracing_figures(aie, pictures)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
