"""Measure the ablation loss gap of every component under every method, on the test prompts."""

from itertools import product

import torch

from oacore.ablation.components import components_of
from oacore.ablation.gaps import evaluate, gap_table, summary_table
from oacore.ablation.optimal import load_constants
from oacore.config.ablation import ABLATION_TYPES
from oacore.config.run import Config
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.convergence import read_convergence
from oacore.fits.resume import Resumable
from oacore.inputs import gated_model, items_of, read_splits
from oacore.jobs import Files
from oacore.store.artefacts import digest_of_tensors, write_table
from oacore.store.codehash import codehash
from oacore.store.items import Item
from oacore.store.samples import write_samples


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write gaps.csv, what its gaps are means of, and summary.csv."""
    model, methods, kinds = (
        gated_model(config, inputs["model"]).model,
        config.ablation.methods,
        config.ablation.components,
    )
    prompts, provenance = read_splits(config, inputs, task)
    statistics = read_statistics(inputs["activations"], provenance, model.device)
    files = dict(zip(config.ablation.fitted(), inputs.all("constants"), strict=True))
    fits = {method: read_convergence(path, provenance.requiring(method=method)) for method, path in files.items()}
    components = {kind: components_of(model, [kind]) for kind in kinds}
    constants = {
        (kind, method): load_constants(path, components[kind], provenance.requiring(method=method)).to(model.device)
        for kind, (method, path) in product(kinds, files.items())
    }
    wanted = list(product(kinds, methods))
    own = [
        {
            "method": method,
            "kind": kind,
            "code of the method": codehash(ABLATION_TYPES[method].module),
            "constants": digest_of_tensors({method: constants[kind, method]}) if method in files else None,
        }
        for kind, method in wanted
    ]
    items = items_of(config, inputs, "gaps", provenance, ["train", "test"], ["oacore.ablation.gaps"])
    with Resumable.beside(outputs["gaps"], provenance, "oacore.ablation.gaps") as resumable:

        def compute(new: list[int]) -> list[Item]:
            gaps: dict[tuple[str, str], torch.Tensor] = {}
            for kind in kinds:
                of_kind = [index for index in new if wanted[index][0] == kind]
                if not of_kind:
                    continue
                asked = [wanted[index][1] for index in of_kind]
                found = evaluate(
                    model,
                    components[kind],
                    asked,
                    statistics,
                    {method: constants[kind, method] for method in asked if method in files},
                    batch_of(prompts["test"], model.device),
                    batch_of(prompts["test"], model.device, counterfactual=True),
                    seed=config.seed,
                    tokens_per_batch=config.limits.tokens_per_batch,
                    resumable=resumable.part(kind, items.identity([own[index] for index in of_kind])),
                    what=f"{task} gaps of {kind}",
                )
                gaps |= {(kind, method): values for method, values in found.items()}
            return [Item({"gaps": gaps[wanted[index]]}) for index in new]

        of_pairs = dict(zip(wanted, items.get(own, compute, f"{task} gaps"), strict=True))
        every = components_of(model, kinds)
        by_kind = [item for kind in kinds for item in components[kind]]
        order = [by_kind.index(item) for item in every]
        gaps = {
            method: torch.cat([of_pairs[kind, method].tensors["gaps"] for kind in kinds])[order] for method in methods
        }
        table = gap_table(every, gaps, prompts["test"].cluster, fits)
        write_table(outputs["summary"], summary_table(table), provenance)
        measured_on = {"prompts": provenance.required["prompts_hash"]["test"]}
        by_prompt = {"gap_nats": torch.cat(list(gaps.values()))}
        write_samples(outputs["by_prompt"], by_prompt, prompts["test"].cluster, measured_on, provenance)
        write_table(outputs["gaps"], table, provenance)
