"""Draw what lenses predict."""

from oacore.config.run import Config
from oacore.inputs import provenance_of
from oacore.jobs import Files
from oacore.lenses.drawing import token_grid_svg
from oacore.lenses.plots import lens_figures
from oacore.report.figures import save
from oacore.store.artefacts import read_table, write_svg


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write every figure as SVG and PNG, and the pictures of single prompts as SVG."""
    assert config.lenses is not None
    provenance = provenance_of(config, inputs["model"], task)
    tables = {name: read_table(inputs[name], provenance) for name in config.lenses.tables()}
    fitted_at = getattr(config.tasks.selected()[task], "n_tokens", None)
    figures = lens_figures(**tables, fitted_at=fitted_at)
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
    # Tokens may read "NA" or "null".
    pictures = read_table(inputs["pictures"], provenance, keep_default_na=False)
    for number, path in enumerate(outputs.all("drawings")):
        write_svg(path, token_grid_svg(pictures[pictures["prompt"] == number]), provenance)
