"""Draw a task's circuit figures from its tables and circuit files."""

import numpy as np
import pandas as pd

from oacore import circuit_drawing, circuit_plots, plots
from oacore.artefacts import read_table, write_svg, write_table
from oacore.circuits.circuit import Circuit, edge_frequency, edge_table, load, stability
from oacore.config import Config
from oacore.layout import Layout, circuit_file
from oacore.stages.common import model_facts, need, origin

DRAWN_EDGES = 1000  # more make a page of megabytes that nobody can read


def run(config: Config, task: str) -> None:
    """Write pareto.csv of all methods, stability.csv, edge_frequency.csv, the figures and one drawing per ablation type."""
    layout = Layout(config)
    settings = config.circuits
    assert settings is not None
    folders = [f"{method}-{ablation}" for ablation in settings.ablations for method in settings.methods]
    belongs = origin(layout, task)
    tables = [read_table(need(layout.circuits(task, f"{folder}/pareto.csv"), "circuit_evaluation"), belongs) for folder in folders]
    pareto = pd.concat(tables, ignore_index=True)
    n_edges = model_facts(layout)["sizes"]["n_edges"]
    write_table(layout.circuits(task, "pareto.csv"), pareto, belongs)
    frequency, alike = _over_seeds(layout, task, pareto)
    write_table(layout.circuits(task, "stability.csv"), alike, belongs)
    write_table(layout.circuits(task, "edge_frequency.csv"), frequency, belongs)
    figures = circuit_plots.circuit_figures(pareto, n_edges)
    for name, figure in figures.items():
        plots.save(figure, layout.circuits(task, f"figures/{name}"), belongs)
    for ablation in settings.ablations:
        svg = _drawing(layout, task, pareto[pareto["ablation"] == ablation])
        write_svg(layout.circuits(task, f"figures/circuit_{ablation}.svg"), svg, belongs)


def _drawing(layout: Layout, task: str, pareto: pd.DataFrame) -> str:
    """One circuit of UGS, if it was run, otherwise of the first method; of any method, if all of that one's are too large."""
    pareto = pareto[pareto["kl_nats"].notna()]
    own = pareto[pareto["method"] == ("ugs" if (pareto["method"] == "ugs").any() else pareto["method"].iloc[0])]
    row = circuit_plots.smallest_good(own if (own["edges"] <= DRAWN_EDGES).any() else pareto, DRAWN_EDGES)
    circuit = _load(layout, task, row)
    title = f"{row['method']} {row['ablation']}, knob {row['knob']:g}, seed {row['seed']}: {row['edges']} edges, {row['kl_nats']:.3g} nats"
    return circuit_drawing.circuit_svg(edge_table(circuit), circuit.graph, title)


def _load(layout: Layout, task: str, row: pd.Series) -> Circuit:
    path = layout.circuits(task, f"{row['method']}-{row['ablation']}/{circuit_file(row['knob'], int(row['seed']))}")
    return load(path, model_hash=model_facts(layout)["model_hash"], signed=True)


def _over_seeds(layout: Layout, task: str, pareto: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How often each edge is in a circuit, and how alike circuits are, over the seeds of each method, ablation type and knob."""
    frequencies, rows = [], []
    for (method, ablation, knob), group in pareto.groupby(["method", "ablation", "knob"], sort=False):
        if len(group) < 2:
            continue
        circuits = [_load(layout, task, row) for _, row in group.iterrows()]
        masks = np.stack([circuit.mask for circuit in circuits])
        share, graph = edge_frequency(masks), circuits[0].graph
        names = [graph.edge_name(int(s), int(j)) for j, s in np.argwhere(share > 0)]
        frequencies.append(pd.DataFrame({"method": method, "ablation": ablation, "knob": knob, "edge": names, "share": share[share > 0]}))
        alike = stability(masks)
        rows.append((method, ablation, knob, len(group), *alike))
    columns = ["method", "ablation", "knob", "n_circuits", "jaccard", "jaccard_low", "jaccard_high"]
    empty = pd.DataFrame(columns=["method", "ablation", "knob", "edge", "share"])
    return pd.concat(frequencies, ignore_index=True) if frequencies else empty, pd.DataFrame(rows, columns=columns)
