"""Find the circuits of one method under one ablation type, one for each knob and seed, and judge them on held-out
prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from oakernels.runtime import choices

from oacore.circuits.circuit import Circuit
from oacore.circuits.judge import Judge, Judged
from oacore.circuits.mib_file import save_circuit
from oacore.circuits.search import Search, SearchRequest, find
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, CircuitMethod, EdgeAblation
from oacore.config.run import Config
from oacore.fits.convergence import columns_in, typed
from oacore.fits.resume import Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.metrics import clustered_means_and_ses
from oacore.store.artefacts import digest_of_tensors, write_table, write_tensors
from oacore.store.layout import circuit_file
from oacore.store.provenance import Provenance
from oacore.store.samples import write_samples


def run(
    config: Config, inputs: Files, outputs: Files, task: str, method: CircuitMethod, ablation: EdgeAblation
) -> None:
    """Write search.safetensors, every circuit, losses.safetensors, pareto.csv and, where fitted, constants."""
    settings = config.circuits
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    provenance = opened.provenance.requiring(method=method, ablation=ablation)
    provenance = provenance.noting(objective=settings.objective_of(method))
    row, constants = CIRCUIT_METHODS[method], None
    if settings.takes_constants(method, ablation):
        constants = digest_of_tensors(opened.component_constants(ablation)._asdict())
    items = items_of(
        config,
        inputs,
        "circuits",
        opened.provenance,
        ["train"],
        [row.module, EDGE_ABLATIONS[ablation].module],
        method=method,
        ablation=ablation,
        settings=settings.read_by_each(method, ablation),
        constants=constants,
    )
    with Resumable.beside(outputs["search"], provenance, row.module) as resumable:
        request = SearchRequest.of_all(opened, settings, method, ablation)
        search, took = find(replace(request, resumable=resumable), items)
        sizes, what = ", ".join(str(int(n)) for n in search.masks.sum((1, 2))), f"{task} {method} {ablation}"
        print(f"{what}: {len(search.knobs)} circuits of {sizes} edges", flush=True)
        judge = Judge(config, inputs, opened, ablation, settings.refit, what, resumable)
        judged = judge.judge(search.masks, [f"{method} {knob:g}" for knob in search.knobs])
        if choices.used:  # on a GPU, where they were measured
            provenance = provenance.noting(backends=choices.used)
        search.save(outputs["search"], provenance)
        _write(opened, provenance, outputs, search, took, judged)
    _remove_orphans(outputs["pareto"].parent, outputs.all("circuits"))


def _write(
    opened: CircuitTask,
    provenance: Provenance,
    outputs: Files,
    search: Search,
    took: Sequence[Mapping[str, Any]],
    judged: Judged,
) -> None:
    """Circuits, losses, constants and the table."""
    folder, model, rows = outputs["pareto"].parent, opened.engine.model, []
    test, validation = (judged.losses[split] for split in ("test", "validation"))
    kl, se = (part.tolist() for part in clustered_means_and_ses(test.kl, opened.clusters))
    logit_diff, chosen_by = (values.double().mean(1).tolist() for values in (test.logit_diff, validation.kl))
    for index, (knob, seed) in enumerate(zip(search.knobs, search.seeds, strict=True)):
        facts = provenance.noting(knob=knob, seed=seed, d_model=model.d_model, kl_nats=kl[index]).facts
        scores, mask = search.scores[index].double().numpy(), search.masks[index].numpy()
        circuit = Circuit.of(opened.engine.graph, scores, mask, facts)
        save_circuit(folder / circuit_file(knob, seed), circuit)
        rows.append(
            {
                "method": facts["method"],
                "ablation": facts["ablation"],
                "objective": facts["objective"],
                "knob": knob,
                "seed": seed,
                "edges": circuit.n_edges,
                "nodes": circuit.n_nodes,
                "kl_nats": kl[index],
                "se_nats": se[index],
                "validation_kl_nats": chosen_by[index],
                "logit_diff": logit_diff[index],
                "fit_seconds": took[index]["seconds"],
                "peak_mb": took[index]["peak_mb"],
                **dict(zip(columns_in("nats"), judged.fits[index], strict=True)),
            }
        )
    of_all = provenance.noting(knobs=search.knobs, seeds=search.seeds)
    measured_on = {"prompts": provenance.required["prompts_hash"]["test"]}
    write_samples(outputs["losses"], {"kl": test.kl.float()}, opened.clusters, measured_on, of_all)
    if judged.constants is not None:
        write_tensors(folder / "constants.safetensors", judged.constants._asdict(), of_all)
    write_table(outputs["pareto"], typed(pd.DataFrame(rows)), provenance)


def _remove_orphans(folder: Path, circuits: Sequence[Path]) -> None:
    """Circuits of knobs and seeds that the config no longer has."""
    for path in folder.glob("*-s*.json"):
        if path not in circuits:
            path.unlink()
