"""Judge all circuits of one ablation type on equal terms: constants fitted anew, then held-out losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.artefacts import read_json, write_table, write_tensors
from oacore.circuits.circuit import Circuit, save
from oacore.circuits.evaluate import Measured, measure, refit_constants
from oacore.circuits.patching import Constants
from oacore.codehash import codehash
from oacore.config import FITTED, CircuitMethod, Circuits, Config, EdgeAblation
from oacore.layout import Layout, circuit_file, short_hash
from oacore.metrics import mean_and_se
from oacore.stages.circuit_setting import Found, Setting, circuit_folder
from oacore.stages.common import need


def run(config: Config, task: str, ablation: EdgeAblation) -> None:
    """Write every method's circuits, pareto.csv and, for fitted ablations, constants.safetensors."""
    settings, layout = config.circuits, Layout(config)
    assert settings is not None
    setting = Setting.open(config, task)
    found = {
        method: Found.load(
            need(circuit_folder(layout, task, method, ablation) / "search.safetensors", "circuit_search"),
            setting.expect | {"method": method, "ablation": ablation},
        )
        for method in settings.methods
    }
    masks = torch.cat([part.masks for part in found.values()])
    # Different methods, and neighbouring knobs, often find the same circuit: it is fitted once.
    unique, which = np.unique(np.packbits(masks.flatten(1).numpy(), axis=1), axis=0, return_inverse=True)
    first = torch.tensor([int(np.flatnonzero(which == index)[0]) for index in range(len(unique))])
    own = masks[first].float().to(setting.engine.model.device)
    names = [_name(found, int(row)) for row in first]
    constants, measured = _judge(setting, settings, ablation, own, names)
    start = 0
    for method, part in found.items():
        rows = torch.from_numpy(which[start : start + len(part.knobs)]).flatten()
        start += len(part.knobs)
        picked = Measured(measured.kl[rows], measured.logit_diff[rows])
        _write(setting, settings, method, ablation, part, picked, None if constants is None else Constants(*(x[rows] for x in constants)))
    _checkpoint(layout, task, ablation).unlink(missing_ok=True)


def _judge(
    setting: Setting, settings: Circuits, ablation: EdgeAblation, masks: Tensor, names: list[str]
) -> tuple[Constants | None, Measured]:
    start, constants = setting.start(ablation), None
    if ablation in FITTED:
        identity = short_hash([setting.identity, ablation, settings.refit.model_dump(), names, masks.sum((1, 2)).tolist(), _code()])
        constants, fit = refit_constants(
            setting.passes["train"],
            setting.passes["validation"],
            start,
            setting.scales,
            masks,
            settings.refit,
            names=names,
            seed=setting.config.seed,
            checkpoint=_checkpoint(setting.layout, setting.task, ablation),
            identity=identity,
            what=f"{setting.task} {ablation} refit",
        )
        print(f"{setting.task} {ablation}: constants of {int(fit.converged.sum())} of {len(masks)} circuits converged")
    return constants, measure(setting.passes["test"], masks, setting.replacements(ablation, "test", start), constants)


def _code() -> str:
    return codehash("oacore.stages.circuit_evaluation")


def _checkpoint(layout: Layout, task: str, ablation: EdgeAblation) -> Path:
    return Path(layout.circuits(task, f".refit-{ablation}-checkpoint.safetensors"))


def _name(found: dict[CircuitMethod, Found], row: int) -> str:
    for method, part in found.items():
        if row < len(part.knobs):
            return f"{method} {part.knobs[row]:g}"
        row -= len(part.knobs)
    raise IndexError(row)


def _write(
    setting: Setting,
    settings: Circuits,
    method: CircuitMethod,
    ablation: EdgeAblation,
    found: Found,
    measured: Measured,
    constants: Constants | None,
) -> None:
    folder = circuit_folder(setting.layout, setting.task, method, ablation)
    graph, rows = setting.engine.graph, []
    timing = read_json(need(folder / "timing.json", "circuit_search"), setting.expect | {"method": method, "ablation": ablation})
    kl, se = (part.cpu().tolist() for part in mean_and_se(measured.kl))
    logit_diff = measured.logit_diff.double().mean(1).cpu().tolist()
    about = {**setting.identity, "method": method, "ablation": ablation, "objective": settings.objective_of(method)}
    for index, (knob, seed) in enumerate(zip(found.knobs, found.seeds, strict=True)):
        facts: dict[str, Any] = {**about, "knob": knob, "seed": seed, "d_model": setting.engine.model.d_model, "kl_nats": kl[index]}
        circuit = Circuit.of(graph, found.scores[index].double().numpy(), found.masks[index].numpy(), facts)
        save(folder / circuit_file(knob, seed), circuit)
        rows.append(
            {
                "method": method,
                "ablation": ablation,
                "objective": about["objective"],
                "knob": knob,
                "seed": seed,
                "edges": circuit.n_edges,
                "nodes": circuit.n_nodes,
                "kl_nats": kl[index],
                "se_nats": se[index],
                "logit_diff": logit_diff[index],
                "fit_seconds": timing["seconds_per_circuit"],
                "peak_mb": timing["peak_mb"],
            }
        )
    if constants is not None:
        write_tensors(folder / "constants.safetensors", constants._asdict(), {**about, "knobs": found.knobs, "seeds": found.seeds})
    write_table(folder / "pareto.csv", pd.DataFrame(rows), about)
