"""Circuits under the rules of the MIB benchmark: their score, and their constants in its basis. Not part of the
workflow.
"""

from pathlib import Path

import numpy as np
import torch

from oacore.circuits import mib
from oacore.circuits.circuit import Circuit
from oacore.circuits.evaluate import circuit_losses
from oacore.circuits.mib_file import load_circuit, save_circuit
from oacore.circuits.task import CircuitTask
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.jobs import Files
from oacore.models.graph import Graph
from oacore.store.artefacts import read_json, read_tensors, write_tensors
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance


def print_score(config: Config, path: Path, task: str | None = None) -> None:
    """Print CPR and CMD of a circuit file's scores: logit difference on the test prompts, counterfactual patching, as
    MIB judges.
    """
    opened, circuit = _open(config, path, task)
    replacements = opened.replacements("counterfactual", "test", opened.start("counterfactual"))

    def evaluate(masks: np.ndarray) -> np.ndarray:
        wide = torch.from_numpy(masks).float().to(opened.engine.model.device)
        losses = circuit_losses(opened.passes["test"], wide, replacements)
        means: np.ndarray = losses.logit_diff.double().mean(1).cpu().numpy()
        return means

    signed, magnitude = (
        mib.score(circuit.graph, circuit.scores, evaluate, absolute=absolute) for absolute in (False, True)
    )
    print(magnitude.table.to_string(index=False, float_format="{:.4g}".format))
    print(f"CPR {signed.cpr:.4f} (log {signed.cpr_log:.4f}), ranked with sign")
    print(f"CMD {magnitude.cmd:.4f} (log {magnitude.cmd_log:.4f}), ranked by magnitude")


def export_circuit(config: Config, path: Path, output: Path, task: str | None = None) -> None:
    """Write the circuit as {output}/importances.json and its constants as {output}/constants.safetensors in MIB's
    basis.
    """
    opened, circuit = _open(config, path, task)
    knob_and_seed = tuple(circuit.facts.get(name) for name in ("knob", "seed"))
    beside = path.parent / "constants.safetensors"
    if not beside.exists():
        raise UserError(f"{beside}: missing; allowed: a circuit that was judged under optimal ablation")
    fitted, tensors = read_tensors(beside, opened.provenance)
    circuits = list(zip(fitted["knobs"], fitted["seeds"], strict=True))
    if knob_and_seed not in circuits:
        raise UserError(
            f"{beside}: no constants for {path.name}; allowed: a circuit that was judged under optimal ablation"
        )
    constants = {name: value[circuits.index(knob_and_seed)] for name, value in tensors.items()}
    if constants["input"].shape[0] != 1:
        raise UserError(
            f"{beside}: one constant per position, which EAP-IG has no place for; allowed: circuits under optimal "
            "ablation"
        )
    flat = {"input": constants["input"][0], "head": constants["head"][:, :, 0], "mlp": constants["mlp"][:, 0]}
    exported = mib.export_constants(opened.engine.model, flat, opened.passes["train"].examples.batch.lengths)
    save_circuit(output / "importances.json", circuit)
    write_tensors(output / "constants.safetensors", exported, Provenance(noted=circuit.facts))
    print(f"{output}: importances.json, constants.safetensors; docs/mib.md says how EAP-IG reads them")


def _open(config: Config, path: Path, task: str | None) -> tuple[CircuitTask, Circuit]:
    """The circuit, and the task it belongs to.

    Raises:
        UserError: a circuit of another model, or of a task that the config does not have.
    """
    layout = Layout(config)
    facts = read_json(layout.model_json)
    sizes = facts["sizes"]
    graph = Graph(sizes["n_layers"], sizes["n_heads"], sizes["n_kv_heads"], facts["parallel"])
    circuit = load_circuit(path, graph, facts["model_hash"])
    task = task or circuit.facts.get("task")
    if task not in config.tasks.selected():
        raise UserError(
            f"{path}: task {task!r}; allowed by the config: {', '.join(config.tasks.selected())}; name one with --task"
        )
    named = {"model": layout.model_json, "prompts": layout.prompts(task), "activations": layout.activations(task)}
    return CircuitTask.open(config, Files(named), task), circuit
