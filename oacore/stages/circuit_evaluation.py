"""Judge all circuits of one ablation type on equal terms: constants fitted anew, then held-out losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.circuits.circuit import Circuit
from oacore.circuits.constants import Constants
from oacore.circuits.evaluate import CircuitLosses, circuit_losses, refit_constants
from oacore.circuits.mib_file import save_circuit
from oacore.circuits.search import Search
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import EDGE_ABLATIONS, Circuits, EdgeAblation
from oacore.config.run import Config
from oacore.fits.convergence import UNFITTED, Convergence, columns_in, of_descent, typed
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.jobs import Files
from oacore.metrics import clustered_means_and_ses
from oacore.store.artefacts import read_json, write_table, write_tensors
from oacore.store.codehash import codehash
from oacore.store.layout import circuit_file
from oacore.store.provenance import Provenance


def run(config: Config, inputs: Files, outputs: Files, task: str, ablation: EdgeAblation) -> None:
    """Write every method's circuits, pareto.csv and, for fitted ablations, constants.safetensors."""
    settings = config.circuits
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    judged = _read(settings, opened, ablation, inputs, outputs)
    masks = torch.cat([part.search.masks for part in judged])
    # Different methods, and neighbouring knobs, often find the same circuit: it is fitted once.
    unique, which = np.unique(np.packbits(masks.flatten(1).numpy(), axis=1), axis=0, return_inverse=True)
    first = torch.tensor([int(np.flatnonzero(which == index)[0]) for index in range(len(unique))])
    names = [name for part in judged for name in part.names]
    names = [names[row] for row in first.tolist()]
    distinct = masks[first].float().to(opened.engine.model.device)
    with _resumable(settings, opened, ablation, outputs, names, distinct) as resumable:
        constants, losses, fits = _judge(settings, opened, ablation, distinct, names, resumable)
        start = 0
        for part in judged:
            rows = torch.from_numpy(which[start : start + len(part.names)]).flatten()
            start += len(part.names)
            own_constants = None if constants is None else Constants(*(values[rows] for values in constants))
            own_fits = [fits[row] for row in rows.tolist()]
            _write(opened, part, CircuitLosses(losses.kl[rows], losses.logit_diff[rows]), own_constants, own_fits)


@dataclass(frozen=True)
class _Judged:
    """One method's circuits, and where what is said of them goes."""

    method: str
    search: Search
    timing: dict[str, Any]
    pareto: Path
    provenance: Provenance

    @property
    def names(self) -> list[str]:
        """What errors call the circuits."""
        return [f"{self.method} {knob:g}" for knob in self.search.knobs]


def _read(
    settings: Circuits, opened: CircuitTask, ablation: EdgeAblation, inputs: Files, outputs: Files
) -> list[_Judged]:
    files = zip(settings.methods, inputs.all("searches"), inputs.all("timings"), outputs.all("paretos"), strict=True)
    judged = []
    for method, search, timing, pareto in files:
        provenance = opened.provenance.requiring(method=method, ablation=ablation)
        read = Search.load(search, provenance), read_json(timing, provenance)
        judged.append(_Judged(method, *read, pareto, provenance.noting(objective=settings.objective_of(method))))
    return judged


def _resumable(
    settings: Circuits,
    opened: CircuitTask,
    ablation: EdgeAblation,
    outputs: Files,
    names: Sequence[str],
    masks: Tensor,
) -> Resumable:
    """Where the fit of all circuits' constants is kept, beside the methods' folders."""
    if not EDGE_ABLATIONS[ablation].fitted:
        return NOT_KEPT
    folder = outputs.all("paretos")[0].parents[1]
    depends_on = [ablation, settings.refit.model_dump(), names, masks.sum((1, 2)).tolist()]
    depends_on.append(codehash(EDGE_ABLATIONS[ablation].module))
    return Resumable.beside(folder / f"refit-{ablation}", opened.provenance, "oacore.circuits.evaluate", *depends_on)


def _judge(
    settings: Circuits,
    opened: CircuitTask,
    ablation: EdgeAblation,
    masks: Tensor,
    names: Sequence[str],
    resumable: Resumable,
) -> tuple[Constants | None, CircuitLosses, Sequence[Convergence]]:
    """Constants of every circuit, where the ablation type has fitted ones, all losses on the test prompts, and how the
    fits came out.
    """
    start, constants, fits = opened.start(ablation), None, [UNFITTED] * len(masks)
    if EDGE_ABLATIONS[ablation].fitted:
        constants, descent = refit_constants(
            opened.passes["train"],
            opened.passes["validation"],
            start,
            opened.constant_scales,
            masks,
            settings.refit,
            names=names,
            seed=opened.seed,
            resumable=resumable,
            what=f"{opened.name} {ablation} refit",
        )
        converged, fits = int(descent.converged.sum()), of_descent(descent)
        print(f"{opened.name} {ablation}: constants of {converged} of {len(masks)} circuits converged")
    replacements = opened.replacements(ablation, "test", start)
    return constants, circuit_losses(opened.passes["test"], masks, replacements, constants), fits


def _write(
    opened: CircuitTask,
    judged: _Judged,
    losses: CircuitLosses,
    constants: Constants | None,
    fits: Sequence[Convergence],
) -> None:
    """The files of one method."""
    folder, search, model, rows = judged.pareto.parent, judged.search, opened.engine.model, []
    kl, se = (part.tolist() for part in clustered_means_and_ses(losses.kl, opened.clusters))
    logit_diff = losses.logit_diff.double().mean(1).cpu().tolist()
    for index, (knob, seed) in enumerate(zip(search.knobs, search.seeds, strict=True)):
        facts = judged.provenance.noting(knob=knob, seed=seed, d_model=model.d_model, kl_nats=kl[index]).facts
        scores, mask = search.scores[index].double().numpy(), search.masks[index].numpy()
        circuit = Circuit.of(opened.engine.graph, scores, mask, facts)
        save_circuit(folder / circuit_file(knob, seed), circuit)
        rows.append(
            {
                "method": judged.method,
                "ablation": facts["ablation"],
                "objective": facts["objective"],
                "knob": knob,
                "seed": seed,
                "edges": circuit.n_edges,
                "nodes": circuit.n_nodes,
                "kl_nats": kl[index],
                "se_nats": se[index],
                "logit_diff": logit_diff[index],
                "fit_seconds": judged.timing["seconds_per_circuit"],
                "peak_mb": judged.timing["peak_mb"],
                **dict(zip(columns_in("nats"), fits[index], strict=True)),
            }
        )
    if constants is not None:
        provenance = judged.provenance.noting(knobs=search.knobs, seeds=search.seeds)
        write_tensors(folder / "constants.safetensors", constants._asdict(), provenance)
    write_table(judged.pareto, typed(pd.DataFrame(rows)), judged.provenance)
