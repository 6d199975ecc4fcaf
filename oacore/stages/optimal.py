"""Fit optimal constants for every component."""

from oacore.ablation.components import components_of
from oacore.ablation.optimal import better_start, fit_constants, load_constants, save_constants, starting_means
from oacore.config.ablation import ABLATION_TYPES, Method
from oacore.config.run import Config
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files


def run(config: Config, inputs: Files, outputs: Files, task: str, method: Method) -> None:
    """Write constants-{method}.safetensors; a positional fit starts from the better of one constant and the means."""
    settings, row, limit = config.ablation.optimal, ABLATION_TYPES[method], config.limits.tokens_per_batch
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    train, validation = (batch_of(splits[split], model.device) for split in ("train", "validation"))
    statistics = read_statistics(inputs["activations"], provenance, model.device)
    components = components_of(model, config.ablation.components)
    start = starting_means(model, components, statistics, positional=row.positional)
    if row.starts_from:
        fitted = load_constants(inputs["start"], components, provenance.requiring(method=row.starts_from))
        start = better_start(model, validation, components, start, fitted.to(model.device), limit)
    provenance = provenance.requiring(method=method).noting(settings=settings.model_dump())
    names = [item.name for item in components]
    with Resumable.beside(outputs["constants"], provenance, "oacore.ablation.optimal", names) as resumable:
        descent = fit_constants(
            model,
            components,
            statistics,
            train,
            validation,
            settings,
            start=start,
            seed=config.seed,
            tokens_per_batch=limit,
            resumable=resumable,
            what=f"{task} {method}",
        )
        save_constants(outputs["constants"], model, components, descent, provenance)
    converged, steps = int(descent.converged.sum()), int(descent.n_steps.max())
    print(f"{task} {method}: {converged} of {len(components)} components converged in {steps} steps or fewer")
