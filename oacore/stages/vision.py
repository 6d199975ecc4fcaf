"""Measure the importance of one kind of units of a convolutional network by every method."""

from functools import cache
from importlib.metadata import version

import numpy as np
import torch

from oacore.config.run import Config
from oacore.config.vision import UnitKind
from oacore.fits.resume import Resumable
from oacore.jobs import Files
from oacore.store.artefacts import read_json, write_table
from oacore.store.codehash import codehash
from oacore.store.items import FOLDER, Items
from oacore.store.provenance import Provenance
from oacore.store.samples import write_samples
from oacore.vision.data import read_pictures
from oacore.vision.measures import Bench, bench
from oacore.vision.network import rows_at_once
from oacore.vision.source import read_network
from oacore.vision.study import Study, at_budgets, randomised, shuffled, whole
from oacore.vision.tables import VisionTables, agreement_table, curve_table, importance_table, sanity_table
from oacore.vision.units import units_of


def run(config: Config, inputs: Files, outputs: Files, units: UnitKind) -> None:
    """Write importance.csv, what its importances are means of, agreement.csv, curves.csv and sanity.csv of one kind of
    units.
    """
    settings, kind = config.vision, units
    assert settings is not None
    torch.set_num_threads(config.limits.threads)
    facts = read_json(inputs["model"])
    hashes = {name: facts[name] for name in ("model_hash", "images_hash")}
    network = read_network(inputs["weights"], facts, settings)
    splits = read_pictures(inputs["images"], Provenance({"images_hash": facts["images_hash"]}))
    chosen = units_of(network, kind, settings.layer, facts["n_branches"])
    at_once = rows_at_once(network, splits["test"].pixels, config.limits.tokens_per_batch)

    @cache
    def bench_of(part: str) -> Bench:
        return bench(shuffled(network, part, config.seed) if part else network, chosen, splits, settings, at_once)

    images = "digits" if settings.pretrained is None else "images"

    def items(name: str, module: str, *keys: str) -> Items:
        layer = {"layer": settings.layer} if kind == "channels" else {}
        code = {"torch": torch.__version__, "captum": version("captum"), "code": codehash(f"oacore.vision.{module}")}
        determined = {**hashes, **code, "units": kind, **layer, **settings.model_dump(mode="json", include=set(keys))}
        return Items(inputs["model"].parent / FOLDER / images, name, determined, {"run": config.run})

    provenance = Provenance({**hashes, "units": kind}, {"run": config.run, "seed": config.seed})
    with Resumable.beside(outputs["importance"], provenance, "oacore.vision.fit") as resumable:
        study = Study(
            settings, chosen, bench_of, items("constants", "fit", "fit"), items("measurements", "measures", "ig_steps"),
            resumable,
        )  # fmt: skip
        requests = whole(settings, config.seed)
        if settings.ranked(kind):
            compared, shuffles = at_budgets(settings, chosen, config.seed), randomised(settings, config.seed)
        else:
            compared, shuffles = [], []
        found = study.run([*requests, *compared, *shuffles], f"vision {kind}")
        full, budgeted, shuffled_ones = ({r: found[r] for r in of} for of in (requests, compared, shuffles))
        compared_with = full if settings.ranked(kind) else {}
        tables = VisionTables(
            importance_table(kind, chosen, full),
            agreement_table(kind, compared_with, budgeted, config.seed),
            curve_table(kind, bench_of(""), compared_with, study.together(requests)),
            sanity_table(kind, full, shuffled_ones),
        )
        by_image = torch.cat([torch.as_tensor(of.measurement.values).T for of in full.values()])
        measured_on = {"images": facts["images_hash"]}
        write_samples(
            outputs["by_image"], {"importance_nats": by_image}, np.arange(by_image.shape[1]), measured_on, provenance
        )
        for name, table in tables._asdict().items():
            write_table(outputs[name], table, provenance)
