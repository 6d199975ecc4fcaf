"""Judge all circuits of one ablation type on equal terms: constants fitted anew, then held-out losses."""

import hashlib
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
from oacore.fits.record import descent_of, items_of_fits
from oacore.fits.resume import Resumable
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.metrics import clustered_means_and_ses
from oacore.store.artefacts import digest_of_tensors, read_json, write_table, write_tensors
from oacore.store.items import Item
from oacore.store.layout import circuit_file
from oacore.store.provenance import Provenance

JUDGED_ON = ("test", "validation")  # circuits are reported on the first and chosen on the second
JUDGED_BY = "oacore.circuits.evaluate"


def run(config: Config, inputs: Files, outputs: Files, task: str, ablation: EdgeAblation) -> None:
    """Write every method's circuits, pareto.csv, losses.safetensors and, where fitted, constants.safetensors."""
    settings = config.circuits
    assert settings is not None
    opened = CircuitTask.open(config, inputs, task)
    judged = _read(settings, opened, ablation, inputs, outputs)
    masks = torch.cat([part.search.masks for part in judged])
    # Different methods, and neighbouring knobs, often find the same circuit: it is fitted once.
    packed = np.packbits(masks.flatten(1).numpy(), axis=1)
    unique, which = np.unique(packed, axis=0, return_inverse=True)
    first = torch.tensor([int(np.flatnonzero(which == index)[0]) for index in range(len(unique))])
    names = [name for part in judged for name in part.names]
    circuits = _Circuits(
        [names[row] for row in first.tolist()],
        masks[first].float().to(opened.engine.model.device),
        [{"mask": hashlib.sha256(row.tobytes()).hexdigest()} for row in unique],
    )
    constants: Constants | None = None
    fits: Sequence[Convergence] = [UNFITTED] * len(unique)
    folder = outputs.all("paretos")[0].parents[1]
    with Resumable.beside(folder / f"refit-{ablation}", opened.provenance, JUDGED_BY) as resumable:
        if EDGE_ABLATIONS[ablation].fitted:
            constants, fits = _fit(config, inputs, opened, ablation, circuits, resumable)
        losses = _losses(config, inputs, opened, ablation, circuits, constants)
        start = 0
        for part in judged:
            rows = torch.from_numpy(which[start : start + len(part.names)]).flatten()
            start += len(part.names)
            own_constants = None if constants is None else Constants(*(values[rows] for values in constants))
            own_losses = {split: CircuitLosses(*(part[rows] for part in of)) for split, of in losses.items()}
            _write(opened, part, own_losses, own_constants, [fits[row] for row in rows.tolist()])
            _remove_orphans(part.pareto.parent, outputs.all("circuits"))


def _remove_orphans(folder: Path, circuits: Sequence[Path]) -> None:
    """Circuits of knobs and seeds that the config no longer has."""
    for path in folder.glob("*-s*.json"):
        if path not in circuits:
            path.unlink()


@dataclass(frozen=True)
class _Circuits:
    """The different circuits among all that are judged."""

    names: list[str]  # what errors call them
    masks: Tensor  # [C, J, S]
    digests: list[dict[str, str]]  # what determines an item of each

    def __len__(self) -> int:
        return len(self.names)


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


def _fit(
    config: Config,
    inputs: Files,
    opened: CircuitTask,
    ablation: EdgeAblation,
    circuits: _Circuits,
    resumable: Resumable,
) -> tuple[Constants, Sequence[Convergence]]:
    """Constants of every circuit, on the CPU, and how their fits came out."""
    assert config.circuits is not None
    settings, what, start = config.circuits.refit, f"{opened.name} {ablation} refit", opened.start(ablation)
    items = items_of(
        config,
        inputs,
        "refits",
        opened.provenance,
        ["train", "validation"],
        [JUDGED_BY, EDGE_ABLATIONS[ablation].module],
        ablation=ablation,
        settings=settings.model_dump(),
    )

    def compute(new: list[int]) -> list[Item]:
        _, descent = refit_constants(
            opened.passes["train"],
            opened.passes["validation"],
            start,
            opened.constant_scales,
            circuits.masks[new],
            settings,
            names=[circuits.names[row] for row in new],
            seed=opened.seed,
            resumable=resumable.part("fit", items.identity([circuits.digests[row] for row in new])),
            what=what,
        )
        return items_of_fits(descent, [[row] for row in range(len(new))])

    descent = descent_of(items.get(circuits.digests, compute, what))
    print(
        f"{opened.name} {ablation}: constants of {int(descent.converged.sum())} of {len(circuits)} circuits converged"
    )
    return start.unflattened(descent.best), of_descent(descent)


def _losses(
    config: Config,
    inputs: Files,
    opened: CircuitTask,
    ablation: EdgeAblation,
    circuits: _Circuits,
    constants: Constants | None,
) -> dict[str, CircuitLosses]:
    """Of every circuit, on the test prompts and on the validation prompts, on the CPU."""
    own = circuits.digests
    if constants is not None:
        rows = [Constants(*(part[row] for part in constants)) for row in range(len(circuits))]
        own = [of | {"constants": digest_of_tensors(row._asdict())} for of, row in zip(own, rows, strict=True)]
    losses = {}
    for split in JUDGED_ON:
        items = items_of(
            config,
            inputs,
            "losses",
            opened.provenance,
            ["train", split],
            [JUDGED_BY, EDGE_ABLATIONS[ablation].module],
            ablation=ablation,
            split=split,
        )

        def compute(new: list[int], split: str = split) -> list[Item]:
            replacements = opened.replacements(ablation, split, opened.start(ablation))
            device = circuits.masks.device
            chosen = None if constants is None else Constants(*(part[new].to(device) for part in constants))
            found = circuit_losses(opened.passes[split], circuits.masks[new], replacements, chosen)
            return [Item({"kl": kl, "logit_diff": other}) for kl, other in zip(*found, strict=True)]

        of_circuits = items.get(own, compute, f"{opened.name} {ablation} losses on the {split} prompts")
        losses[split] = CircuitLosses(
            *(torch.stack([item.tensors[name] for item in of_circuits]) for name in CircuitLosses._fields)
        )
    return losses


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
        values.double().mean(1).tolist() for values in (losses["test"].logit_diff, losses["validation"].kl)
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
                "fit_seconds": judged.timing["seconds"][index],
                "peak_mb": judged.timing["peak_mb"][index],
                **dict(zip(columns_in("nats"), fits[index], strict=True)),
            }
        )
    provenance = judged.provenance.noting(knobs=search.knobs, seeds=search.seeds)
    write_tensors(judged.losses, {"kl": losses["test"].kl.float()}, provenance)
    if constants is not None:
        write_tensors(folder / "constants.safetensors", constants._asdict(), provenance)
    write_table(judged.pareto, typed(pd.DataFrame(rows)), judged.provenance)
