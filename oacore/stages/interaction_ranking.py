"""Rank a task's components by what ablating each of them alone costs on validation prompts."""

from oacore.circuits.judge import JUDGED_BY, Judge
from oacore.circuits.task import CircuitTask
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.interactions.ranking import check_names, ranking
from oacore.jobs import Files
from oacore.store.artefacts import write_table


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write ranking.csv, under the first ablation type."""
    settings = config.interactions
    assert settings is not None
    opened, ablation = CircuitTask.open(config, inputs, task), settings.ablations[0]
    check_names(opened.engine.graph, settings.components)
    provenance = opened.provenance.requiring(ablation=ablation)
    with Resumable.beside(outputs["ranking"], provenance, JUDGED_BY) as resumable:
        judge = Judge(config, inputs, opened, ablation, settings.refit, f"{task} {ablation} ranking", resumable)
        write_table(outputs["ranking"], ranking(judge), provenance)
