"""Set the run beside a finished one."""

from oacore.compare.page import write_comparison
from oacore.compare.runs import Runs
from oacore.config.read import compared_runs
from oacore.config.run import Config
from oacore.jobs import Files
from oacore.store.layout import Layout


def run(config: Config, inputs: Files, outputs: Files, other: str) -> None:
    """Write the page and the table of numbers."""
    prefix = str(inputs["model"]).removesuffix(Layout(config).model_json)  # as a module of another workflow
    runs = Runs(Layout(compared_runs(config)[other].config), Layout(config, prefix=prefix))
    write_comparison(runs, outputs["numbers"], outputs["page"])
