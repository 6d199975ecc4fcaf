"""Measure effects and interactions of a task's most important components under one ablation type."""

from oacore.circuits.judge import JUDGED_BY, Judge
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import EdgeAblation
from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.interactions.effects import measure
from oacore.interactions.ranking import chosen
from oacore.jobs import Files
from oacore.store.artefacts import read_table, write_table
from oacore.store.samples import write_samples


def run(config: Config, inputs: Files, outputs: Files, task: str, ablation: EdgeAblation) -> None:
    """Write effects.csv, paths.csv and interactions.csv of one ablation type, and what effects and interactions are
    means of.
    """
    settings = config.interactions
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    ranked = read_table(inputs["ranking"], opened.provenance.requiring(ablation=settings.ablations[0]))
    components = chosen(ranked, opened.engine.graph, settings)
    print(f"{task} {ablation}: effects and interactions of {', '.join(components)}", flush=True)
    provenance = opened.provenance.requiring(ablation=ablation)
    with Resumable.beside(outputs["effects"], provenance, JUDGED_BY) as resumable:
        judge = Judge(config, inputs, opened, ablation, settings.refit, f"{task} {ablation}", resumable)
        tables, by_prompt = measure(judge, components, settings.mediators)
        measured_on = {"prompts": provenance.required["prompts_hash"]["test"]}
        write_samples(outputs["by_prompt"], by_prompt, opened.clusters, measured_on, provenance)
        for name, table in tables._asdict().items():
            write_table(outputs[name], table, provenance)
