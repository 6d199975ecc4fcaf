"""Fit optimal ablation's constants for causal tracing: one for each place, and one for the corrupted run."""

from oacore.config.run import Config
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files
from oacore.tracing.facts import traced_facts
from oacore.tracing.fit import fit_place_constants, save_place_constants
from oacore.tracing.places import NOWHERE, curves_of, places_of


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write constants.safetensors."""
    tracing, limit = config.tracing, config.limits.tokens_per_batch
    assert tracing is not None
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, "facts")
    facts = traced_facts(model, splits, tracing.answer, limit)
    facts.pictured(tracing.pictures)  # a wish that can't be met is said before the fit
    places = [*(places_of(curves_of(tracing), model.n_layers) if tracing.per_place else []), NOWHERE]
    provenance = provenance.requiring(answer=tracing.answer).noting(settings=tracing.fit.model_dump())
    names = [item.name for item in places]
    with Resumable.beside(outputs["constants"], provenance, "oacore.tracing.fit", names) as resumable:
        constants, descent = fit_place_constants(
            model,
            places,
            facts.recall["train"],
            facts.recall["validation"],
            facts.statistics,
            tracing.fit,
            seed=config.seed,
            tokens_per_batch=limit,
            resumable=resumable,
        )
        save_place_constants(outputs["constants"], places, constants, descent, provenance)
    converged, steps = int(descent.converged.sum()), int(descent.n_steps.max())
    print(f"OAT: {converged} of {len(places)} constants converged in {steps} steps or fewer")
