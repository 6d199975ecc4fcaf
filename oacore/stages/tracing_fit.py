"""Fit optimal ablation's constants for causal tracing: one for each place, and one for the corrupted run."""

from oacore.config.run import Config
from oacore.fits.record import descent_of, items_of_fits
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, items_of, read_splits
from oacore.jobs import Files
from oacore.store.items import Item
from oacore.tracing.facts import traced_facts
from oacore.tracing.fit import fit_place_constants, place_constants, save_place_constants
from oacore.tracing.places import NOWHERE, curves_of, places_of, rows_of


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write constants.safetensors."""
    tracing, limit = config.tracing, config.limits.tokens_per_batch
    assert tracing is not None
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    facts = traced_facts(model, splits, tracing, limit)
    facts.pictured(tracing.pictures)  # a wish that can't be met is said before the fit
    curves = curves_of(tracing) if tracing.per_place else []
    groups = {curve.name: places_of([curve], model.n_layers) for curve in curves} | {NOWHERE.name: [NOWHERE]}
    own = [{"places": name} for name in groups]
    items = items_of(
        config,
        inputs,
        "place-constants",
        provenance,
        ["train", "validation"],
        ["oacore.tracing.fit", "oacore.tracing.facts"],
        answer=tracing.answer,
        settings=tracing.fit.model_dump(),
    )
    provenance = provenance.requiring(answer=tracing.answer).noting(settings=tracing.fit.model_dump())
    with Resumable.beside(outputs["constants"], provenance, "oacore.tracing.fit") as resumable:

        def compute(new: list[int]) -> list[Item]:
            asked = [list(groups.values())[index] for index in new]
            places = list(dict.fromkeys(place for group in asked for place in group))
            descent = fit_place_constants(
                model,
                places,
                facts.recall["train"],
                facts.recall["validation"],
                facts.statistics,
                tracing.fit,
                seed=config.seed,
                tokens_per_batch=limit,
                resumable=resumable.part("fit", items.identity([own[index] for index in new])),
            )
            return items_of_fits(descent, [rows_of(places, group) for group in asked])

        of_groups = items.get(own, compute, "OAT")
        fitted = [place for group in groups.values() for place in group]
        places = list(dict.fromkeys(fitted))
        descent = descent_of(of_groups).take(rows_of(fitted, places))
        constants = place_constants(model, places, facts.recall["validation"], descent.best.to(model.device), limit)
        save_place_constants(outputs["constants"], places, constants, descent, provenance)
    converged, steps = int(descent.converged.sum()), int(descent.n_steps.max())
    print(f"OAT: {converged} of {len(places)} constants converged in {steps} steps or fewer")
