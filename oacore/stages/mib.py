"""Circuits under the rules of the MIB benchmark: their score, and their constants in its basis. Not part of the workflow."""

from pathlib import Path

import numpy as np
import torch

from oacore.artefacts import read_tensors
from oacore.circuits import mib
from oacore.circuits.circuit import Circuit, load, save
from oacore.circuits.evaluate import measure
from oacore.config import Config
from oacore.errors import UserError
from oacore.graph import Graph
from oacore.layout import Layout
from oacore.stages.circuit_setting import Setting
from oacore.stages.common import model_facts


def score(config: Config, path: Path, task: str | None = None) -> None:
    """Print CPR and CMD of a circuit file's scores: logit difference on the test prompts, counterfactual patching, as MIB judges."""
    setting, circuit = _open(config, path, task)
    replacements = setting.replacements("counterfactual", "test", setting.start("counterfactual"))

    def evaluate(masks: np.ndarray) -> np.ndarray:
        found = measure(setting.passes["test"], torch.from_numpy(masks).float().to(setting.engine.model.device), replacements)
        means: np.ndarray = found.logit_diff.double().mean(1).cpu().numpy()
        return means

    signed, magnitude = (mib.score(circuit.graph, circuit.scores, evaluate, absolute=absolute) for absolute in (False, True))
    print(magnitude.table.to_string(index=False, float_format="{:.4g}".format))
    print(f"CPR {signed.cpr:.4f} (log {signed.cpr_log:.4f}), ranked with sign")
    print(f"CMD {magnitude.cmd:.4f} (log {magnitude.cmd_log:.4f}), ranked by magnitude")


def export(config: Config, path: Path, output: Path, task: str | None = None) -> None:
    """Write the circuit as {output}/importances.json and its constants as {output}/constants.safetensors in MIB's basis."""
    setting, circuit = _open(config, path, task)
    facts = {name: circuit.facts.get(name) for name in ("knob", "seed")}
    beside = path.parent / "constants.safetensors"
    if not beside.exists():
        raise UserError(f"{beside}: missing; allowed: a circuit that was judged under optimal ablation")
    about, tensors = read_tensors(beside, setting.expect)
    circuits = list(zip(about["knobs"], about["seeds"], strict=True))
    if (which := (facts["knob"], facts["seed"])) not in circuits:
        raise UserError(f"{beside}: no constants for {path.name}; allowed: a circuit that was judged under optimal ablation")
    constants = {name: value[circuits.index(which)] for name, value in tensors.items()}
    if constants["input"].shape[0] != 1:
        raise UserError(f"{beside}: one constant per position, which EAP-IG has no place for; allowed: circuits under optimal ablation")
    flat = {"input": constants["input"][0], "head": constants["head"][:, :, 0], "mlp": constants["mlp"][:, 0]}
    exported = mib.export_constants(setting.engine.model, flat, setting.passes["train"].examples.batch.lengths)
    save(output / "importances.json", circuit)
    mib.save_constants(output / "constants.safetensors", exported, circuit.facts)
    print(f"{output}: importances.json, constants.safetensors; docs/mib.md says how EAP-IG reads them")


def _open(config: Config, path: Path, task: str | None) -> tuple[Setting, Circuit]:
    """The circuit, and the task it belongs to.

    Raises:
        UserError: a circuit of another model, or of a task that the config does not have.
    """
    facts = model_facts(Layout(config))
    sizes = facts["sizes"]
    graph = Graph(sizes["n_layers"], sizes["n_heads"], sizes["n_kv_heads"], facts["parallel"])
    circuit = load(path, graph, facts["model_hash"])
    task = task or circuit.facts.get("task")
    if task not in config.tasks.selected():
        raise UserError(f"{path}: task {task!r}; allowed by the config: {', '.join(config.tasks.selected())}; name one with --task")
    return Setting.open(config, task), circuit
