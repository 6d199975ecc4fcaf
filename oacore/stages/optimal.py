"""Fit optimal constants for every component."""

from collections.abc import Sequence

import torch

from oacore.ablation.components import Component, components_of, width
from oacore.ablation.optimal import better_start, fit_constants, load_constants, save_constants, starting_means
from oacore.config.ablation import ABLATION_TYPES, ComponentKind, Method
from oacore.config.run import Config
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.descent import Descent
from oacore.fits.record import descent_of, items_of_fits
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, items_of, read_splits
from oacore.jobs import Files
from oacore.models.weights import Model
from oacore.store.artefacts import digest_of_tensors
from oacore.store.items import Item


def run(config: Config, inputs: Files, outputs: Files, task: str, method: Method) -> None:
    """Write constants-{method}.safetensors; a positional fit starts from the better of one constant and the means."""
    settings, row, limit = config.ablation.optimal, ABLATION_TYPES[method], config.limits.tokens_per_batch
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    train, validation = (batch_of(splits[split], model.device) for split in ("train", "validation"))
    statistics = read_statistics(inputs["activations"], provenance, model.device)
    kinds, of_start = config.ablation.components, provenance.requiring(method=row.starts_from)
    own: list[dict[str, str]] = [{"kind": kind} for kind in kinds]
    if row.starts_from:
        constants = {kind: load_constants(inputs["start"], components_of(model, [kind]), of_start) for kind in kinds}
        own = [
            of | {"start": digest_of_tensors({"start": constants[kind]})} for of, kind in zip(own, kinds, strict=True)
        ]
    items = items_of(
        config,
        inputs,
        "constants",
        provenance,
        ["train", "validation"],
        ["oacore.ablation.optimal"],
        method=method,
        settings=settings.model_dump(),
    )
    provenance = provenance.requiring(method=method)
    with Resumable.beside(outputs["constants"], provenance, "oacore.ablation.optimal") as resumable:

        def compute(new: list[int]) -> list[Item]:
            components = components_of(model, [kinds[index] for index in new])
            start = starting_means(model, components, statistics, positional=row.positional)
            if row.starts_from:
                fitted = load_constants(inputs["start"], components, of_start).to(model.device)
                start = better_start(model, validation, components, start, fitted, limit)
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
                resumable=resumable.part("fit", items.identity([own[index] for index in new])),
                what=f"{task} {method}",
            )
            return [_of_kind(model, components, descent, kinds[index]) for index in new]

        of_kinds = items.get(own, compute, f"{task} {method}")
        components = components_of(model, kinds)
        descent = _joined(components, kinds, of_kinds)
        noted = provenance.noting(settings=settings.model_dump())
        save_constants(outputs["constants"], model, components, descent, noted)
    converged, steps = int(descent.converged.sum()), int(descent.n_steps.max())
    print(f"{task} {method}: {converged} of {len(components)} components converged in {steps} steps or fewer")


def _of_kind(model: Model, components: Sequence[Component], descent: Descent, kind: ComponentKind) -> Item:
    """The fits of one kind's components, as wide as they are."""
    rows = [row for row, item in enumerate(components) if item.kind == kind]
    (item,) = items_of_fits(descent, [rows])
    return Item({**item.tensors, "best": item.tensors["best"][..., : width(model, kind)]})


def _joined(components: Sequence[Component], kinds: Sequence[ComponentKind], of_kinds: Sequence[Item]) -> Descent:
    """The fits of all kinds in the order of the components, padded with zeros to the widest."""
    widest = max(item.tensors["best"].shape[-1] for item in of_kinds)
    padded = []
    for item in of_kinds:
        best = item.tensors["best"]
        padded.append(Item({**item.tensors, "best": torch.nn.functional.pad(best, (0, widest - best.shape[-1]))}))
    by_kind = [item for kind in kinds for item in components if item.kind == kind]
    return descent_of(padded).take([by_kind.index(item) for item in components])
