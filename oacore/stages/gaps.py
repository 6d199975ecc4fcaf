"""Measure the ablation loss gap of every component under every method, on the test prompts."""

from oacore.ablation.components import components_of
from oacore.ablation.gaps import evaluate, gap_table, summary_table
from oacore.ablation.optimal import load_constants
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.run import Config
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.convergence import read_convergence
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_table
from oacore.store.codehash import codehash


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write gaps.csv and summary.csv."""
    model, methods = gated_model(config, inputs["model"]).model, config.ablation.methods
    prompts, provenance = read_splits(config, inputs, task)
    statistics = read_statistics(inputs["activations"], provenance, model.device)
    components = components_of(model, config.ablation.components)
    files = dict(zip(config.ablation.fitted(), inputs.all("constants"), strict=True))
    constants = {
        method: load_constants(path, components, provenance.requiring(method=method)).to(model.device)
        for method, path in files.items()
    }
    fits = {method: read_convergence(path, provenance.requiring(method=method)) for method, path in files.items()}
    depends_on = [methods, [item.name for item in components], digest_of_tensors(constants)]
    depends_on += [codehash(ABLATION_TYPES[method].module) for method in methods]
    with Resumable.beside(outputs["gaps"], provenance, "oacore.stages.gaps", *depends_on) as resumable:
        gaps = evaluate(
            model,
            components,
            methods,
            statistics,
            constants,
            batch_of(prompts["test"], model.device),
            batch_of(prompts["test"], model.device, counterfactual=True),
            seed=config.seed,
            tokens_per_batch=config.limits.tokens_per_batch,
            resumable=resumable,
            what=f"{task} gaps",
        )
        table = gap_table(components, gaps, prompts["test"].cluster, fits)
        write_table(outputs["summary"], summary_table(table), provenance)
        write_table(outputs["gaps"], table, provenance)
