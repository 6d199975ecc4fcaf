"""Trace facts: average indirect effects on held-out subjects, and a few facts token by token."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from oacore.config.run import Config
from oacore.config.tracing import CORRUPTIONS, Tracing, kind_and_scale, noises
from oacore.fits.convergence import OfFits, read_convergence
from oacore.inputs import gated_model, items_of, read_splits
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_json, write_table
from oacore.store.codehash import codehash
from oacore.store.items import Item
from oacore.store.samples import write_samples
from oacore.tracing.corruptions import Corruptor, corruptor
from oacore.tracing.effects import Traced, aie_table, fits_behind
from oacore.tracing.facts import traced_facts
from oacore.tracing.fit import NO_CONSTANTS, load_place_constants
from oacore.tracing.pictures import picture_table
from oacore.tracing.places import NOWHERE, Place, curves_of, places_of, rows_of
from oacore.tracing.recall import Recall
from oacore.tracing.trace import trace


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write aie.csv, what its effects are means of, pictures.csv and facts.json."""
    tracing, limit = config.tracing, config.limits.tokens_per_batch
    assert tracing is not None
    loaded = gated_model(config, inputs["model"])
    model, n_layers = loaded.model, loaded.model.n_layers
    splits, provenance = read_splits(config, inputs, task)
    facts = traced_facts(model, splits, tracing, limit)
    pictured = facts.pictured(tracing.pictures)
    curves = curves_of(tracing)
    places, constants = places_of(curves, n_layers), NO_CONSTANTS
    fits: OfFits = {}
    if tracing.fitted:
        fitted = [*places, NOWHERE] if tracing.per_place else [NOWHERE]
        of_answer = provenance.requiring(answer=tracing.answer)
        constants = load_place_constants(inputs["constants"], fitted, of_answer).to(model.device)
        fits = read_convergence(inputs["constants"], of_answer)
    modules = ["oacore.tracing.trace", "oacore.tracing.facts"]
    items = items_of(config, inputs, "effects", provenance, ["train", "test"], modules, answer=tracing.answer)

    def corrupting(name: str, wanted: Sequence[Place]) -> Corruptor:
        """A corruption whose constants are those of the wanted places and of the corrupted run."""
        kept = constants
        if CORRUPTIONS[kind_and_scale(name)[0]].per_place:
            kept = constants.take([*rows_of(places, wanted), -1])
        return corruptor(name, model, facts.statistics, kept, config.seed, tracing.n_draws)

    def of_curves(name: str) -> list[Traced]:
        groups = [places_of([curve], n_layers) for curve in curves]
        own = [
            {"corruption": name, "places": curve.name} | _behind(tracing, name, corrupting(name, group))
            for curve, group in zip(curves, groups, strict=True)
        ]

        def compute(new: list[int]) -> list[Item]:
            asked = places_of([curves[index] for index in new], n_layers)
            traced = trace(model, facts.test, asked, corrupting(name, asked), limit, name)
            return [traced.item(rows_of(asked, groups[index])) for index in new]

        return [Traced.of_item(item) for item in items.get(own, compute, f"tracing under {name}")]

    clusters = facts.test.cluster.cpu().numpy()
    aie, brought_back = [], []
    for name in tracing.corruption_names():
        for curve, traced in zip(curves, of_curves(name), strict=True):
            of_curve = places_of([curve], n_layers)
            aie.append(aie_table(name, traced, of_curve, clusters, [curve], n_layers, fits_behind(name, fits)))
            brought_back.append(traced.brought_back[[of_curve.index(place) for place in curve.places(n_layers)]])

    def of_fact(name: str, row: int, recall: Recall, cells: Sequence[Place]) -> Traced:
        corrupt = corruptor(name, model, facts.statistics, constants, config.seed, tracing.n_draws)
        own = {"corruption": name, "fact": row, "cells": [cell.name for cell in cells]}
        own |= _behind(tracing, name, corrupt)
        (item,) = items.get([own], lambda _: [trace(model, recall, cells, corrupt, limit, "").item()])
        return Traced.of_item(item)

    pictures = picture_table(loaded, facts, pictured, tracing.pictured_corruptions(), tracing, of_fact)
    n_subjects, n_clusters = (len(set(each.tolist())) for each in (facts.test.subject_numbers, clusters))
    provenance = provenance.requiring(answer=tracing.answer)
    found = {"counts": facts.counts, "n_subjects": n_subjects, "n_clusters": n_clusters}
    write_json(outputs["facts"], found, provenance)
    write_table(outputs["pictures"], pictures, provenance)
    measured_on = {"prompts": provenance.required["prompts_hash"]["test"], "facts": facts.test.numbers.tolist()}
    write_samples(outputs["by_prompt"], {"aie": torch.cat(brought_back)}, clusters, measured_on, provenance)
    write_table(outputs["aie"], pd.concat(aie, ignore_index=True), provenance)
    print(
        f"tracing: {len(facts.test)} facts about {n_subjects} subjects, {len(places)} places, "
        f"{len(tracing.corruption_names())} corruptions"
    )


def _behind(tracing: Tracing, name: str, corrupt: Corruptor) -> dict[str, Any]:
    """What else determines what a corruption does."""
    return {
        "draws": tracing.draws_of(name) if noises([name]) else None,
        "constants": digest_of_tensors({"constant": corrupt.sources.constant}),
        "code of the corruption": codehash(CORRUPTIONS[kind_and_scale(name)[0]].module),
    }
