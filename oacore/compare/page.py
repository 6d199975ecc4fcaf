"""The page that sets two runs side by side, and the table of their numbers beside it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from oacore.circuits.plots import pareto_front
from oacore.compare.circuits import Edges, circuits_of_both
from oacore.compare.differences import differ, how_errors_were_added, most_different
from oacore.compare.numbers import numbers_of_both
from oacore.compare.runs import Runs
from oacore.compare.settings import settings_that_differ
from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.jobs import comparison_files
from oacore.report.figures import svg_of
from oacore.report.numbers import SIGNIFICANT, Estimate
from oacore.report.page import write
from oacore.report.parts import Details, Figure, Part, Section, Table
from oacore.report.series import in_order
from oacore.store.artefacts import read_json, write_table
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance

SHOWN = 15  # rows of a table on the page, those that differ most in standard errors; the CSV file has all


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
    page = Path(comparison_files(runs.second, first.run)["page"])
    write_comparison(runs, page.with_suffix(".csv"), page)
    return page


def write_comparison(runs: Runs, table: Path, page: Path) -> None:
    """Write the numbers of both runs as a table, and the page."""
    numbers = numbers_of_both(runs)
    models = [read_json(layout.model_json) for layout in (runs.first, runs.second)]
    required = {"model_hash": models[1]["model_hash"], "compared_with": runs.first.config.run}
    write_table(table, numbers, Provenance(required, {"run": runs.second.config.run}))
    title = f"{runs.names[1]} compared with {runs.names[0]}"
    facts = {}
    for name, layout, model in zip(runs.names, (runs.first, runs.second), models, strict=True):
        made = {"model": model["model"], "weight hash": model["model_hash"][:16], "precision": model["dtype"]}
        facts[name] = made | {"seed": str(layout.config.seed), **model["versions"]}
    write(page, title, facts, list(_sections(runs, numbers, models[0]["sizes"]["n_edges"])))


def _sections(runs: Runs, numbers: pd.DataFrame, n_edges: int) -> Iterator[Section]:
    settings = settings_that_differ(runs.first.config, runs.second.config)
    named = settings.rename(columns=dict(zip(("first", "second"), runs.names, strict=True)))
    said = f"{len(settings)} key{' differs' if len(settings) == 1 else 's differ'}."
    intro = said if len(settings) else "All settings are equal."
    yield Section("Settings", intro, [Table(named, "Keys with other values.")] if len(settings) else [])
    for table, rows in numbers.groupby("table", sort=False):
        yield _numbers_section(runs, str(table), rows)
    every = list(circuits_of_both(runs))
    for task in runs.circuit_tasks:
        edges = [of for of in every if of.task == task]
        intro = f"In the figures circuits of {runs.names[1]} are dashed."
        parts = [*_fronts(runs, task, n_edges), *_circuits(runs.names, edges)]
        yield Section(f"{task}: circuits, front over front and edge by edge", intro, parts)


def _numbers_section(runs: Runs, table: str, rows: pd.DataFrame) -> Section:
    most = most_different(rows, SHOWN)
    estimates = {
        name: [Estimate(value, se) for value, se in zip(most[value], most[se], strict=True)]
        for name, value, se in (
            (runs.names[0], "first", "first_se"),
            (runs.names[1], "second", "second_se"),
            ("difference", "difference", "se"),
        )
    }
    shown = {"row": most["row"].tolist(), **estimates, "in SE": most["in_se"].tolist()}
    intro = (
        f"{len(rows)} numbers are in both runs, {int(differ(rows).sum())} of which differ by more than "
        f"{SIGNIFICANT:g} standard errors. {how_errors_were_added(rows)}"
    )
    return Section(table, intro, [Table(pd.DataFrame(shown), f"The {len(most)} that differ most, with their SE.")])


def _fronts(runs: Runs, task: str, n_edges: int) -> Iterator[Part]:
    """A figure for each ablation type of both runs."""
    first, second = runs.pareto(task)
    # A front of circuits with an objective of their own is dashed, and named after it.
    plain, name = second["objective"] == "kl", runs.names[1]
    second = second.assign(objective=(second["objective"] + ", " + name).mask(plain, name))
    both = pd.concat([first, second], ignore_index=True)
    for ablation in in_order(set(first["ablation"]) & set(second["ablation"]), EDGE_ABLATIONS):
        svg = svg_of(pareto_front(both, ablation, n_edges))
        yield Figure(svg, f"Fronts of both runs under {ablation} ablation.")


def _circuits(names: tuple[str, str], every: Sequence[Edges]) -> Iterator[Part]:
    """How many edges circuits of one name share, and which they do not."""
    if not every:
        return
    first, second = names
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
