"""Judge all circuits of one ablation type on equal terms: constants fitted anew, then held-out losses."""

from collections.abc import Mapping, Sequence
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

JUDGED_ON = ("test", "validation")  # circuits are reported on the first and chosen on the second


def run(config: Config, inputs: Files, outputs: Files, task: str, ablation: EdgeAblation) -> None:
    """Write every method's circuits, pareto.csv, losses.safetensors and, where fitted, constants.safetensors."""
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
            own_losses = {split: CircuitLosses(*(part[rows] for part in of)) for split, of in losses.items()}
            _write(opened, part, own_losses, own_constants, [fits[row] for row in rows.tolist()])


@dataclass(frozen=True)
class _Judged:
    """One method's circuits, and where what is said of them goes."""

    method: str
    search: Search
    timing: dict[str, Any]
    losses: Path
    pareto: Path
    provenance: Provenance

    @property
    def names(self) -> list[str]:
        """What errors call the circuits."""
        return [f"{self.method} {knob:g}" for knob in self.search.knobs]


def _read(
    settings: Circuits, opened: CircuitTask, ablation: EdgeAblation, inputs: Files, outputs: Files
) -> list[_Judged]:
    read, written = ("searches", "timings"), ("losses", "paretos")
    files = (*(inputs.all(name) for name in read), *(outputs.all(name) for name in written))
    judged = []
    for method, search, timing, losses, pareto in zip(settings.methods, *files, strict=True):
        provenance = opened.provenance.requiring(method=method, ablation=ablation)
        found = Search.load(search, provenance), read_json(timing, provenance)
        noted = provenance.noting(objective=settings.objective_of(method))
        judged.append(_Judged(method, *found, losses, pareto, noted))
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
) -> tuple[Constants | None, dict[str, CircuitLosses], Sequence[Convergence]]:
    """Constants of every circuit, where the ablation type has fitted ones, all losses on the test prompts and on the
    validation prompts, and how the fits came out.
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
    losses = {
        split: circuit_losses(opened.passes[split], masks, opened.replacements(ablation, split, start), constants)
        for split in JUDGED_ON
    }
    return constants, losses, fits


def _write(
    opened: CircuitTask,
    judged: _Judged,
    losses: Mapping[str, CircuitLosses],
    constants: Constants | None,
    fits: Sequence[Convergence],
) -> None:
    """The files of one method."""
    folder, search, model, rows = judged.pareto.parent, judged.search, opened.engine.model, []
    kl, se = (part.tolist() for part in clustered_means_and_ses(losses["test"].kl, opened.clusters))
    logit_diff, chosen_by = (
        values.double().mean(1).cpu().tolist() for values in (losses["test"].logit_diff, losses["validation"].kl)
    )
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
                "validation_kl_nats": chosen_by[index],
                "logit_diff": logit_diff[index],
                "fit_seconds": judged.timing["seconds_per_circuit"],
                "peak_mb": judged.timing["peak_mb"],
                **dict(zip(columns_in("nats"), fits[index], strict=True)),
            }
        )
    provenance = judged.provenance.noting(knobs=search.knobs, seeds=search.seeds)
    write_tensors(judged.losses, {"kl": losses["test"].kl.float().cpu()}, provenance)
    if constants is not None:
        write_tensors(folder / "constants.safetensors", constants._asdict(), provenance)
    write_table(judged.pareto, typed(pd.DataFrame(rows)), judged.provenance)
