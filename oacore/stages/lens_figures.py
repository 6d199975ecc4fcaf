"""Draw what lenses predict."""

from pathlib import Path

import pandas as pd

from oacore import plots
from oacore.checkpoint import atomic_path
from oacore.config import Config, Lenses
from oacore.layout import Layout
from oacore.lens_drawing import token_grid_svg
from oacore.lens_plots import lens_figures
from oacore.stages.common import need


def run(config: Config, task: str) -> None:
    """Write every figure as SVG and PNG, and the pictures of single prompts as SVG."""
    layout, settings = Layout(config), config.lenses
    assert settings is not None
    fitted_at = config.tasks.text.n_tokens if task == "text" and config.tasks.text is not None else None
    for name, figure in lens_figures(**read_tables(layout, settings, task), fitted_at=fitted_at).items():
        plots.save(figure, layout.lens(task, f"figures/{name}"))
    # Tokens may read "NA" or "null".
    pictures = pd.read_csv(need(layout.lens(task, "pictures.csv"), "lens_evaluation"), keep_default_na=False)
    for number in range(settings.pictures):
        with atomic_path(Path(layout.lens(task, f"figures/prompt_{number}.svg"))) as temporary:
            temporary.write_text(token_grid_svg(pictures[pictures["prompt"] == number]), encoding="utf-8")


def read_tables(layout: Layout, settings: Lenses, task: str) -> dict[str, pd.DataFrame]:
    """The tables of a task's lenses by name."""
    stage_of = {"faithfulness": "lens_faithfulness", "truthfulness": "lens_truthfulness"}
    return {name: pd.read_csv(need(layout.lens(task, f"{name}.csv"), stage_of.get(name, "lens_evaluation"))) for name in settings.tables()}
