"""One circuit: found, chosen by its size, drawn, and judged on any task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from oacore.api.model import Model
from oacore.api.results import Drawing, Result, read
from oacore.api.settings import RUN, config_of, constants_for
from oacore.api.tasks import Task
from oacore.circuits.circuit import Circuit as Found
from oacore.circuits.circuit import edge_table
from oacore.circuits.drawing import drawing_of
from oacore.circuits.fronts import best_within
from oacore.circuits.judge import Judge
from oacore.circuits.mib_file import load_circuit, save_circuit
from oacore.circuits.task import CircuitTask
from oacore.config.circuits import CIRCUIT_METHODS
from oacore.errors import UserError
from oacore.fits.convergence import columns_in, typed
from oacore.inputs import provenance_of
from oacore.jobs import Files, files_of
from oacore.metrics import clustered_means_and_ses
from oacore.running import run_behind
from oacore.store.layout import circuit_file


@dataclass(frozen=True, repr=False)
class Circuit(Result):
    """Make it with `circuit`. Tables: `edges`, its edges by their scores; `pareto`, all circuits that it was chosen
    from.

    Args:
        found: mask and scores.
        row: of the circuit in `pareto`.
    """

    model: Model
    found: Found
    row: pd.Series

    @property
    def edges(self) -> pd.DataFrame:
        """source, destination, score of each edge, the highest score first."""
        return self.tables["edges"]

    @property
    def n_edges(self) -> int:
        """The size of the circuit."""
        return self.found.n_edges

    @property
    def kl_nats(self) -> float:
        """KL(model || circuit) in nats on the test prompts that it was not chosen by."""
        return float(self.row["kl_nats"])

    @property
    def se_nats(self) -> float:
        """The standard error of `kl_nats`, over clusters of prompts."""
        return float(self.row["se_nats"])

    def draw(self) -> Drawing:
        """The circuit as a layered graph."""
        return self.figures["circuit"]

    def save(self, path: str | Path) -> None:
        """Write it in the MIB benchmark's format, docs/mib.md."""
        save_circuit(path, self.found)

    def evaluate(self, task: Task, *, ablation: str | None = None) -> pd.DataFrame:
        """Judge the same edges on a task's held-out prompts, with constants fitted anew where the ablation type has
        some, as the pipeline judges every circuit.

        Args:
            ablation: what an ablated edge carries; by default what the circuit was found under.

        Returns:
            One row: task, ablation, edges, kl_nats, se_nats, logit_diff, n_prompts, converged, steps, left_nats.

        Raises:
            UserError: an unknown ablation type, or a bad setting of the task.
        """
        searched = self.settings.circuits
        assert searched is not None
        ablation = self.row["ablation"] if ablation is None else ablation
        asked = {"methods": ["random"], "ablations": [ablation]}  # refuses an ablation type that there is not
        config = config_of(self.model.settings, {task.name: task.settings}, circuits=asked)
        layout = run_behind(config.model_copy(update={"run": RUN}), "activations")
        named = {"prompts": layout.prompts(task.name), "activations": layout.activations(task.name)}
        inputs = Files({"model": layout.model_json, **named})
        opened = CircuitTask.open(config, inputs, task.name)
        what = f"{task.name} {self.row['method']} {ablation}"
        judged = Judge(config, inputs, opened, ablation, searched.refit, what).judge(
            torch.from_numpy(self.found.mask)[None], [f"{self.row['method']} {self.row['knob']:g}"]
        )
        kl, se = clustered_means_and_ses(judged.losses["test"].kl, opened.clusters)
        row = {
            "task": task.name,
            "ablation": ablation,
            "edges": self.n_edges,
            "kl_nats": kl.item(),
            "se_nats": se.item(),
            "logit_diff": judged.losses["test"].logit_diff.double().mean().item(),
            "n_prompts": len(opened.clusters),
            **dict(zip(columns_in("nats"), judged.fits[0], strict=True)),
        }
        return typed(pd.DataFrame([row]))


def circuit(
    model: Model,
    task: Task,
    *,
    method: str = "ugs",
    ablation: str = "optimal",
    edges: int = 100,
    seeds: Sequence[int] = (0,),
    optimal: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Circuit:
    """The circuit of lowest validation KL with at most `edges` edges, of those that a method finds: docs/circuits.md.

    A method with a price or a threshold sweeps it, and another number of edges then costs nothing; one that ranks edges
    takes the best `edges` of them.

    Args:
        ablation: what replaces an ablated edge's source.
        optimal: how the components' constants are fitted, for methods that take them: `ablation.optimal`.
        settings: more keys of the section `circuits`, such as `lambdas`, `masks={"n_steps": 1000}` or `n_prompts`.

    Raises:
        UserError: a bad setting, or every circuit has more edges.
    """
    row = CIRCUIT_METHODS.get(method)
    size = {"sizes": [edges]} if row is not None and row.knob == "sizes" else {}
    section = {"methods": [method], "ablations": [ablation], "seeds": list(seeds)} | size | settings
    constants = constants_for([method], [ablation], optimal)
    config = config_of(model.settings, {task.name: task.settings}, constants, circuits=section)
    layout = run_behind(config, "circuits")
    files = files_of(layout, "circuits", task=task.name, method=method, ablation=ablation)[1]
    pareto = read(files["pareto"], provenance_of(config, Path(layout.model_json), task.name))
    chosen = best_within(pareto, edges)
    if chosen is None:
        knob = CIRCUIT_METHODS[method].knob
        raise UserError(
            f"edges: {edges}; allowed: at least {pareto['edges'].min()}, the size of the smallest circuit that "
            f"{method} has found{f'; other `{knob}` find others' if knob else ''}"
        )
    path = files["pareto"].parent / circuit_file(chosen["knob"], int(chosen["seed"]))
    found = load_circuit(path, model_hash=model.facts["model_hash"], signed=True)
    drawing = Drawing("circuit", drawing_of(found, chosen))
    return Circuit(config, {"edges": edge_table(found), "pareto": pareto}, {"circuit": drawing}, model, found, chosen)
