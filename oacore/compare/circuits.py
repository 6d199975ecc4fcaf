"""Circuits of one name in two runs, edge by edge."""

from collections.abc import Iterator
from dataclasses import dataclass

from oacore.circuits.circuit import Circuit, edge_table
from oacore.circuits.mib_file import load_circuit
from oacore.compare.runs import Runs


@dataclass(frozen=True)
class Edges:
    """Circuits of one name in both runs."""

    task: str
    circuit: str
    first: set[str]  # source->destination
    second: set[str]

    @property
    def jaccard(self) -> float:
        """Of the edges of either, the share of both."""
        either = self.first | self.second
        return len(self.first & self.second) / len(either) if either else 1.0


def circuits_of_both(runs: Runs) -> Iterator[Edges]:
    """Circuits of the same task, method, ablation type, knob and seed, but where the models' graphs differ.

    Raises:
        UserError: a circuit file is damaged.
    """
    for wildcards, *files in runs.of_both("circuits"):
        first, second = ({path.name: path for path in of.all("circuits")} for of in files)
        for name in (name for name in first if name in second):
            own, other = (load_circuit(of[name], signed=True) for of in (first, second))
            if own.graph == other.graph:
                folder = f"{wildcards['method']}-{wildcards['ablation']}"
                circuit = f"{wildcards['task']}/{folder}/{name.removesuffix('.json')}"
                yield Edges(wildcards["task"], circuit, _edges(own), _edges(other))


def _edges(circuit: Circuit) -> set[str]:
    return {f"{source}->{destination}" for source, destination, _ in edge_table(circuit).itertuples(index=False)}
