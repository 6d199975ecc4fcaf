"""Draw what lenses predict."""

import pandas as pd

from oacore import plots
from oacore.artefacts import read_table, write_svg
from oacore.config import Config, Lenses
from oacore.layout import Layout
from oacore.lens_drawing import token_grid_svg
from oacore.lens_plots import lens_figures
from oacore.stages.common import need, origin


def run(config: Config, task: str) -> None:
    """Write every figure as SVG and PNG, and the pictures of single prompts as SVG."""
    layout, settings = Layout(config), config.lenses
    assert settings is not None
    belongs = origin(layout, task)
    fitted_at = config.tasks.text.n_tokens if task == "text" and config.tasks.text is not None else None
    for name, figure in lens_figures(**read_tables(layout, settings, task), fitted_at=fitted_at).items():
        plots.save(figure, layout.lens(task, f"figures/{name}"), belongs)
    # Tokens may read "NA" or "null".
    pictures = read_table(need(layout.lens(task, "pictures.csv"), "lens_evaluation"), belongs, keep_default_na=False)
    for number in range(settings.pictures):
        write_svg(layout.lens(task, f"figures/prompt_{number}.svg"), token_grid_svg(pictures[pictures["prompt"] == number]), belongs)


def read_tables(layout: Layout, settings: Lenses, task: str) -> dict[str, pd.DataFrame]:
    """The tables of a task's lenses by name."""
    stage_of = {"faithfulness": "lens_faithfulness", "truthfulness": "lens_truthfulness"}
    belongs = origin(layout, task)
    return {
        name: read_table(need(layout.lens(task, f"{name}.csv"), stage_of.get(name, "lens_evaluation")), belongs)
        for name in settings.tables()
    }
