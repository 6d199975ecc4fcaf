"""Measure what each method costs on one member of a study, and how good it is at equal passes."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from oacore.ablation.components import components_of
from oacore.config.run import Config
from oacore.config.study import ESTIMATORS
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.convergence import Convergence
from oacore.inputs import gated_model, items_of, provenance_of, read_splits
from oacore.jobs import Files
from oacore.models.weights import Model
from oacore.store.artefacts import read_json, write_table
from oacore.store.codehash import codehash
from oacore.store.items import Item, Items, reset_peak
from oacore.store.layout import SPLITS, Layout
from oacore.store.provenance import Provenance
from oacore.study.comparison import circuit_costs
from oacore.study.effort import Effort, whole, within
from oacore.study.estimates import Bench
from oacore.study.member import placed
from oacore.study.quality import quality
from oacore.study.tables import Measured, accuracy_table, cost_table

REFERENCE = "optimal"
APART = 97  # so that no fit at a budget draws its prompts as the reference's does


def run(config: Config, inputs: Files, outputs: Files, member: str) -> None:
    """Write accuracy.csv, a row for each method and budget, and cost.csv, a row for each method."""
    own = placed(config, member, inputs["member"])
    layout = Layout(own)
    model_json = Path(layout.model_json)
    required = {"model_hash": read_json(model_json)["model_hash"], "member": member}
    facts = read_json(inputs["member"], Provenance(required))
    model, tables, circuits = gated_model(own, model_json).model, [], {}
    for task in config.study_tasks():
        of_model = {"model": member, "n_weights": facts["n_weights"], "task": task}
        tables.append(accuracy_table(of_model, _measured(config, own, model, task)))
        if task in own.circuit_tasks():
            circuits[task] = circuit_costs(own, task, provenance_of(own, model_json, task))
    accuracy = pd.concat(tables, ignore_index=True)
    provenance = Provenance(required, {"run": config.run, "seed": own.seed})
    write_table(outputs["accuracy"], accuracy, provenance)
    write_table(outputs["cost"], cost_table(accuracy, circuits), provenance)


def _measured(config: Config, own: Config, model: Model, task: str) -> list[Measured]:
    """Every method at every budget on one task, and the reference; from the store or now, one after another."""
    settings, layout, seed = config.study, Layout(own), own.seed
    assert settings is not None
    files = {name: getattr(layout, name)(task) for name in ("prompts", "activations")}
    inputs = Files({"model": layout.model_json, **files})
    prompts, provenance = read_splits(own, inputs, task)
    test, device = prompts["test"], model.device
    bench = Bench(
        model,
        components_of(model, own.ablation.components),
        read_statistics(inputs["activations"], provenance, device),
        batch_of(prompts["train"], device),
        batch_of(prompts["validation"], device),
        batch_of(test, device),
        batch_of(test, device, counterfactual=True),
        torch.from_numpy(test.answers).long().to(device),
        torch.from_numpy(test.wrong_answers).long().to(device),
        settings.fit,
        own.limits.tokens_per_batch,
    )
    efforts: dict[tuple[str, int | None], Effort] = {(REFERENCE, None): whole(settings.fit, bench.sizes)}
    for budget in settings.budgets:
        for name in settings.methods:
            if (effort := within(budget, ESTIMATORS[name], bench.sizes, settings.fit)) is not None:
                efforts[name, budget] = effort
    items = _items(own, inputs, provenance, settings.fit.model_dump())
    wanted = [
        {"method": name, "budget": budget, "code of the method": codehash(ESTIMATORS[name].module), **effort._asdict()}
        for (name, budget), effort in efforts.items()
    ]
    asked = list(efforts.items())

    def compute(new: list[int]) -> Iterator[Item]:
        for index in new:
            (name, budget), effort = asked[index]
            reset_peak()
            found = ESTIMATORS[name].load()(bench, ESTIMATORS[name], effort, seed + APART * (budget is not None))
            passes = {"forward": found.passes.forward, "backward": found.passes.backward}
            yield Item({"values": found.values.float()}, passes | {"fit": list(found.fit)})

    # What the first pass of a process makes once is no method's cost.
    ESTIMATORS["mean"].load()(bench, ESTIMATORS["mean"], Effort(2), seed)
    found = items.get(wanted, compute, f"{task} costs")
    reference = found[0].tensors["values"].double().numpy()
    return [
        Measured(
            name,
            budget,
            effort.n_prompts,
            item.facts["forward"],
            item.facts["backward"],
            item.noted["seconds"],
            item.noted["peak_mb"],
            quality(
                item.tensors["values"].double().numpy(), reference, test.cluster, seed,
                are_gaps=not ESTIMATORS[name].gradient,
            ),
            Convergence(*item.facts["fit"]),
        )
        for ((name, budget), effort), item in zip(asked, found, strict=True)
    ]  # fmt: skip


def _items(own: Config, inputs: Files, provenance: Provenance, fit: dict[str, object]) -> Items:
    """The store of costs. How fast a pass is depends on the threads and the size of its batches, too."""
    limits = {"threads": own.limits.threads, "tokens_per_batch": own.limits.tokens_per_batch}
    kinds = list(own.ablation.components)
    return items_of(
        own, inputs, "costs", provenance, SPLITS, ["oacore.study.estimates"], fit=fit, kinds=kinds, **limits
    )
