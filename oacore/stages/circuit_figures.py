"""Draw a task's circuit figures from its tables and circuit files."""

from pathlib import Path

import numpy as np
import pandas as pd

from oacore.circuits.circuit import Circuit
from oacore.circuits.drawing import drawing_of
from oacore.circuits.fronts import compare_fronts, smallest_good
from oacore.circuits.mib_file import load_circuit
from oacore.circuits.plots import circuit_figures
from oacore.circuits.stability import edge_frequency, stability
from oacore.config.circuits import leading
from oacore.config.run import Config
from oacore.inputs import provenance_of
from oacore.jobs import Files
from oacore.report.figures import save
from oacore.store.artefacts import read_arrays, read_json, read_table, write_svg, write_table
from oacore.store.layout import circuit_file
from oacore.tasks.stored import read_prompts

DRAWN_EDGES = 1000  # more make a page of megabytes that nobody can read


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write pareto.csv of all methods, fronts.csv, stability.csv, edge_frequency.csv, the figures and one drawing per
    ablation type.
    """
    assert config.circuits is not None
    provenance, facts = provenance_of(config, inputs["model"], task), read_json(inputs["model"])
    files = _CircuitFiles(inputs, facts["model_hash"])
    pareto = pd.concat([read_table(path, provenance) for path in inputs.all("paretos")], ignore_index=True)
    frequency, alike = _over_seeds(files, pareto)
    losses = np.concatenate([read_arrays(path, provenance)[1]["kl"] for path in inputs.all("losses")])
    clusters = read_prompts(inputs["prompts"], "test").cluster
    write_table(outputs["pareto"], pareto, provenance)
    write_table(outputs["fronts"], compare_fronts(pareto, losses, clusters, seed=config.seed), provenance)
    write_table(outputs["stability"], alike, provenance)
    write_table(outputs["edge_frequency"], frequency, provenance)
    figures = circuit_figures(pareto, facts["sizes"]["n_edges"])
    for svg in outputs.all("figures", ".svg"):
        save(figures[svg.stem], svg.with_suffix(""), provenance)
    for ablation, svg in zip(config.circuits.ablations, outputs.all("drawings"), strict=True):
        write_svg(svg, _drawing(files, pareto[pareto["ablation"] == ablation]), provenance)


class _CircuitFiles:
    """Circuits by the rows of pareto.csv."""

    def __init__(self, inputs: Files, model_hash: str):
        self._paths = {(path.parent.name, path.name): path for path in inputs.all("circuits")}
        self._model_hash = model_hash

    def load(self, row: pd.Series) -> Circuit:
        """The circuit of one row."""
        folder, name = f"{row['method']}-{row['ablation']}", circuit_file(row["knob"], int(row["seed"]))
        path: Path = self._paths[folder, name]
        return load_circuit(path, model_hash=self._model_hash, signed=True)


def _drawing(files: _CircuitFiles, pareto: pd.DataFrame) -> str:
    """One circuit of the leading method; of any method, if all of that one's are too large."""
    pareto = pareto[pareto["kl_nats"].notna()]
    of_leading = pareto[pareto["method"] == leading(dict.fromkeys(pareto["method"]))]
    row = smallest_good(of_leading if (of_leading["edges"] <= DRAWN_EDGES).any() else pareto, DRAWN_EDGES)
    return drawing_of(files.load(row), row)


def _over_seeds(files: _CircuitFiles, pareto: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How often each edge is in a circuit, and how alike circuits are, over the seeds of each method, ablation type and
    knob.
    """
    frequencies, rows = [], []
    for (method, ablation, knob), group in pareto.groupby(["method", "ablation", "knob"], sort=False):
        if len(group) < 2:
            continue
        circuits = [files.load(row) for _, row in group.iterrows()]
        masks = np.stack([circuit.mask for circuit in circuits])
        share, graph = edge_frequency(masks), circuits[0].graph
        names = [graph.edge_name(int(s), int(j)) for j, s in np.argwhere(share > 0)]
        columns = {"method": method, "ablation": ablation, "knob": knob, "edge": names, "share": share[share > 0]}
        frequencies.append(pd.DataFrame(columns))
        rows.append((method, ablation, knob, len(group), *stability(masks)))
    empty = pd.DataFrame(columns=["method", "ablation", "knob", "edge", "share"])
    alike = pd.DataFrame(
        rows, columns=["method", "ablation", "knob", "n_circuits", "jaccard", "jaccard_low", "jaccard_high"]
    )
    return pd.concat(frequencies, ignore_index=True) if frequencies else empty, alike
