"""Two finished runs side by side: what differs in their settings, and what that changed: `python -m oacore compare`.

Numbers of the same name are joined, with their difference and its standard error; fronts are drawn over one another;
circuits of the same name are compared edge by edge. No model is loaded and nothing computed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from oacore.circuits.circuit import Circuit, edge_table
from oacore.circuits.mib_file import load_circuit
from oacore.circuits.plots import pareto_front
from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.report.figures import svg_of
from oacore.report.numbers import SIGNIFICANT, Estimate
from oacore.report.page import write
from oacore.report.parts import Details, Figure, Part, Section, Table
from oacore.report.series import in_order
from oacore.store.artefacts import read_json, read_table
from oacore.store.atomic import atomic_path
from oacore.store.layout import Layout, circuit_file

PLACES = ("run", "cache_dir", "results_dir")  # where a run lies, not what it is
SHOWN = 15  # rows of a table on the page, those that differ most in standard errors; the CSV file has all


@dataclass(frozen=True)
class Measured:
    """A table of results: its file in the run's folder, what names a row, the number and its standard error."""

    file: str
    keys: tuple[str, ...]
    value: str
    se: str


GAPS = Measured("{task}/ablation/gaps.csv", ("component", "method"), "gap_nats", "se_nats")
CIRCUITS = Measured("{task}/circuits/pareto.csv", ("method", "ablation", "knob", "seed"), "kl_nats", "se_nats")
EFFECTS = Measured("{task}/interactions/effects.csv", ("component", "method"), "total_nats", "total_se_nats")
INTERACTIONS = Measured(
    "{task}/interactions/interactions.csv", ("first", "second", "method"), "interaction_nats", "se_nats"
)
AIE = Measured("{task}/tracing/aie.csv", ("corruption", "site", "position", "window", "layer"), "aie", "se")
LENSES = Measured("{task}/lens/loss.csv", ("lens", "init", "layer"), "kl_nats", "se_nats")
IMPORTANCE = Measured("vision/importance.csv", ("units", "unit", "method"), "importance_nats", "se_nats")
MEASURED = (GAPS, CIRCUITS, EFFECTS, INTERACTIONS, AIE, LENSES)


@dataclass(frozen=True)
class Runs:
    """Two finished runs, the first of which the second is compared with."""

    first: Layout
    second: Layout

    @property
    def names(self) -> tuple[str, str]:
        """What the page calls them; of one name, by their folders."""
        names = self.first.config.run, self.second.config.run
        return names if names[0] != names[1] else (self.first.results_dir, self.second.results_dir)

    @property
    def tasks(self) -> list[str]:
        """Tasks of both."""
        others = self.second.config.tasks.selected()
        return [task for task in self.first.config.tasks.selected() if task in others]

    def tables(self, measured: Measured, task: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """A table of both runs, or None where one has none."""
        first, second = (
            Path(layout.results_dir, measured.file.format(task=task)) for layout in (self.first, self.second)
        )
        return (read_table(first), read_table(second)) if first.is_file() and second.is_file() else None


def compare(first: Config, second: Config) -> Path:
    """Write `compared-with-{run}.html` and `.csv` into the second run's folder; returns the page.

    Raises:
        UserError: the runs are one and the same, one is not finished, or they have no number in common.
    """
    runs = Runs(Layout(first), Layout(second))
    for layout in (runs.first, runs.second):
        if not Path(layout.report).is_file():
            raise UserError(f"{layout.report}: missing; allowed: configs of finished runs")
    if Path(runs.first.results_dir).resolve() == Path(runs.second.results_dir).resolve():
        raise UserError(f"{runs.first.results_dir}: both runs; allowed: two runs, of another `run:` or `results_dir:`")
    every = [joined(runs, measured, task) for task in runs.tasks for measured in MEASURED]
    every.append(joined(runs, IMPORTANCE, ""))  # of no task
    numbers = pd.concat([table for table in every if table is not None] or [pd.DataFrame()], ignore_index=True)
    if numbers.empty:
        raise UserError(f"{runs.names[0]} and {runs.names[1]}: no number in common; allowed: runs that share a task")
    page = Path(runs.second.results_dir, f"compared-with-{first.run}.html")
    with atomic_path(page.with_suffix(".csv")) as temporary:
        numbers.to_csv(temporary, index=False)
    title = f"{runs.names[1]} compared with {runs.names[0]}"
    facts = {name: _facts(layout) for name, layout in zip(runs.names, (runs.first, runs.second), strict=True)}
    write(page, title, facts, list(_sections(runs, numbers)))
    return page


def settings_that_differ(first: Config, second: Config) -> pd.DataFrame:
    """Keys of the configs with other values; columns key, first, second."""
    flat = [_flat(config.model_dump(mode="json", exclude=set(PLACES))) for config in (first, second)]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)]
    values = ([str(of.get(key, "–")) for key in keys] for of in flat)
    return pd.DataFrame({"key": keys, **dict(zip(("first", "second"), values, strict=True))})


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else name
        flat |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return flat


def joined(runs: Runs, measured: Measured, task: str) -> pd.DataFrame | None:
    """Rows that both runs have, with columns table, row, first, first_se, second, second_se, difference, se, in_se.

    Standard errors are added as if the runs' prompts were independent: of runs on the same prompts, whose losses go up
    and down together, the error of a difference is smaller than this one.
    """
    if (tables := runs.tables(measured, task)) is None:
        return None
    first, second = (table[[*measured.keys, measured.value, measured.se]] for table in tables)
    both = first.merge(second, on=list(measured.keys), suffixes=("", "_2"))
    value, other = both[measured.value], both[f"{measured.value}_2"]
    se, other_se = both[measured.se], both[f"{measured.se}_2"]
    difference, error = other - value, (se**2 + other_se**2) ** 0.5
    return pd.DataFrame(
        {
            "table": measured.file.format(task=task),
            "row": [" ".join(_words(row)) for row in both[list(measured.keys)].itertuples(index=False)],
            "first": value,
            "first_se": se,
            "second": other,
            "second_se": other_se,
            "difference": difference,
            "se": error,
            "in_se": (difference / error.where(error > 0)).fillna(0.0),
        }
    )


def _words(row: tuple[Any, ...]) -> Iterator[str]:
    """A row's keys, without those that it lacks."""
    for value in row:
        if not pd.isna(value):
            yield f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Edges:
    """Circuits of one name in both runs."""

    circuit: str
    first: set[str]  # source->destination
    second: set[str]

    @property
    def jaccard(self) -> float:
        """Of the edges of either, the share of both."""
        either = self.first | self.second
        return len(self.first & self.second) / len(either) if either else 1.0


def circuits_of_both(runs: Runs, task: str) -> list[Edges]:
    """Circuits of the same method, ablation type, knob and seed; none where the models' graphs differ.

    Raises:
        UserError: a circuit file is damaged.
    """
    if (tables := runs.tables(CIRCUITS, task)) is None:
        return []
    found = []
    for method, ablation, knob, seed in tables[0][list(CIRCUITS.keys)].itertuples(index=False):
        name = f"{method}-{ablation}/{circuit_file(knob, int(seed))}"
        paths = [Path(layout.circuits(task, name)) for layout in (runs.first, runs.second)]
        if not paths[1].is_file():
            continue
        first, second = (load_circuit(path, signed=True) for path in paths)
        if first.graph != second.graph:
            return []
        found.append(Edges(f"{task}/{name}".removesuffix(".json"), _edges(first), _edges(second)))
    return found


def _edges(circuit: Circuit) -> set[str]:
    return {f"{source}->{destination}" for source, destination, _ in edge_table(circuit).itertuples(index=False)}


def _facts(layout: Layout) -> dict[str, object]:
    """What a run was made with."""
    facts = read_json(layout.model_json)
    made = {"model": facts["model"], "weight hash": facts["model_hash"][:16], "precision": facts["dtype"]}
    return made | {"seed": str(layout.config.seed), **facts["versions"]}


def _sections(runs: Runs, numbers: pd.DataFrame) -> Iterator[Section]:
    settings = settings_that_differ(runs.first.config, runs.second.config)
    named = settings.rename(columns=dict(zip(("first", "second"), runs.names, strict=True)))
    differ = f"{len(settings)} key{' differs' if len(settings) == 1 else 's differ'}."
    intro = differ if len(settings) else "All settings are equal."
    yield Section("Settings", intro, [Table(named, "Keys with other values.")] if len(settings) else [])
    for table, rows in numbers.groupby("table", sort=False):
        yield _numbers_section(runs, str(table), rows)
    for task in runs.tasks:
        if parts := [*_fronts(runs, task), *_circuits(runs, task)]:
            intro = f"In the figures circuits of {runs.names[1]} are dashed."
            yield Section(f"{task}: circuits, front over front and edge by edge", intro, parts)


def _numbers_section(runs: Runs, table: str, rows: pd.DataFrame) -> Section:
    apart = int((rows["in_se"].abs() > SIGNIFICANT).sum())
    most = rows.loc[rows["in_se"].abs().sort_values(ascending=False, kind="stable").index].head(SHOWN)
    estimates = {
        name: [Estimate(value, se) for value, se in zip(most[value], most[se], strict=True)]
        for name, value, se in (
            (runs.names[0], "first", "first_se"),
            (runs.names[1], "second", "second_se"),
            ("difference", "difference", "se"),
        )
    }
    shown = pd.DataFrame({"row": most["row"].tolist(), **estimates, "in SE": most["in_se"].tolist()})
    intro = (
        f"{len(rows)} numbers are in both runs, {apart} of which differ by more than {SIGNIFICANT:g} standard errors. "
        "These are added as if the prompts were independent: where both runs have the same prompts, more may differ."
    )
    return Section(table, intro, [Table(shown, f"The {len(shown)} that differ most, with their SE.")])


def _fronts(runs: Runs, task: str) -> Iterator[Part]:
    """A figure for each ablation type of both runs."""
    if (tables := runs.tables(CIRCUITS, task)) is None:
        return
    first, second = tables
    # A front of circuits with an objective of their own is dashed, and named after it.
    plain, name = second["objective"] == "kl", runs.names[1]
    second = second.assign(objective=(second["objective"] + ", " + name).mask(plain, name))
    n_edges = read_json(runs.first.model_json)["sizes"]["n_edges"]
    for ablation in in_order(set(first["ablation"]) & set(second["ablation"]), EDGE_ABLATIONS):
        both = pd.concat([first, second], ignore_index=True)
        svg = svg_of(pareto_front(both, ablation, n_edges))
        yield Figure(svg, f"Fronts of both runs under {ablation} ablation.")


def _circuits(runs: Runs, task: str) -> Iterator[Part]:
    """How many edges circuits of one name share, and which they do not."""
    every = circuits_of_both(runs, task)
    if not every:
        return
    first, second = runs.names
    columns = {
        "circuit": [edges.circuit for edges in every],
        f"edges of {first}": [len(edges.first) for edges in every],
        f"of {second}": [len(edges.second) for edges in every],
        "of both": [len(edges.first & edges.second) for edges in every],
        "Jaccard index": [edges.jaccard for edges in every],
    }
    yield Table(pd.DataFrame(columns), "Circuits of the same method, ablation type, knob and seed.")
    text = [
        f"{edges.circuit}\n  only {first}: {', '.join(sorted(edges.first - edges.second)) or '–'}"
        f"\n  only {second}: {', '.join(sorted(edges.second - edges.first)) or '–'}"
        for edges in every
        if edges.first != edges.second
    ]
    if text:
        yield Details("Edges that one of them alone has", "\n".join(text))
