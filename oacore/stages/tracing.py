"""Trace facts: average indirect effects on held-out subjects, and a few facts token by token."""

import pandas as pd

from oacore.config.run import Config
from oacore.config.tracing import CORRUPTIONS
from oacore.fits.convergence import OfFits, read_convergence
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_json, write_table
from oacore.store.codehash import codehash
from oacore.tracing.corruptions import corruptor
from oacore.tracing.effects import aie_table, fits_behind
from oacore.tracing.facts import traced_facts
from oacore.tracing.fit import NO_CONSTANTS, load_place_constants
from oacore.tracing.pictures import picture_table
from oacore.tracing.places import NOWHERE, curves_of, places_of
from oacore.tracing.trace import trace_all


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write aie.csv, pictures.csv and facts.json."""
    tracing, limit = config.tracing, config.limits.tokens_per_batch
    assert tracing is not None
    loaded = gated_model(config, inputs["model"])
    model, n_layers = loaded.model, loaded.model.n_layers
    splits, provenance = read_splits(config, inputs, "facts")
    facts = traced_facts(model, splits, tracing.answer, limit)
    provenance = provenance.requiring(answer=tracing.answer)
    pictured = facts.pictured(tracing.pictures)
    curves = curves_of(tracing)
    places = places_of(curves, n_layers)
    constants = NO_CONSTANTS
    fits: OfFits = {}
    if tracing.fitted:
        fitted = [*places, NOWHERE] if tracing.per_place else [NOWHERE]
        constants = load_place_constants(inputs["constants"], fitted, provenance).to(model.device)
        fits = read_convergence(inputs["constants"], provenance)
    names, of_pictures = tracing.corruption_names(), tracing.pictured_corruptions()
    corruptors = {
        name: corruptor(name, model, facts.statistics, constants, config.seed, tracing.n_draws)
        for name in (*names, *of_pictures)
    }
    depends_on = [tracing.model_dump(), digest_of_tensors({"own": constants.own, "cautious": constants.cautious})]
    depends_on += [codehash(CORRUPTIONS[kind].module) for kind in tracing.corruption_kinds()]
    with Resumable.beside(outputs["aie"], provenance, "oacore.stages.tracing", *depends_on) as resumable:
        traced = trace_all(model, facts.test, places, {name: corruptors[name] for name in names}, limit, resumable)
        subjects = facts.test.subject_numbers
        aie = [
            aie_table(name, traced[name], places, subjects, curves, n_layers, fits_behind(name, fits)) for name in names
        ]
        pictures = picture_table(
            loaded, facts, pictured, {name: corruptors[name] for name in of_pictures}, tracing, limit
        )
        n_subjects = len(set(subjects.tolist()))
        write_json(outputs["facts"], {"counts": facts.counts, "n_subjects": n_subjects}, provenance)
        write_table(outputs["pictures"], pictures, provenance)
        write_table(outputs["aie"], pd.concat(aie, ignore_index=True), provenance)
    print(
        f"tracing: {len(facts.test)} facts about {n_subjects} subjects, {len(places)} places, {len(names)} corruptions"
    )
