"""The report of a study; what it says is computed from the tables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from oacore.config.study import ESTIMATORS
from oacore.report.convergence import convergence_sentence
from oacore.report.numbers import Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Links, Part, Section, Table
from oacore.study.plots import methods_in_order
from oacore.study.tables import WHOLE

CAPTIONS = {
    "cost": "Cost by size, each method at its largest budget; in brackets the exponents, of seconds and of passes "
    "times weights. Dashed: the fit to its end. Dotted: circuit methods, all of their circuits together.",
    "accuracy": "Rank correlation with the converged optimal gap by passes, with 95\u00a0% intervals over prompts. A "
    "backward pass counts as two.",
    "payoff": "Passes a component from which on OA's order of components is closer to the converged one than that of "
    "each other method.",
}


def study_sections(
    facts: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, str],
    report: Path,
) -> list[Section]:
    """The members with links to their own reports, then a section for each task.

    Args:
        facts: what run.json says of each member.
        tables: cost, accuracy, exponents, payoff, comparison.
        figures: names of `oacore.study.plots.study_figures` to SVG text.
        report: this page, which links start at.
    """
    sections = [_members(facts, tables["comparison"], report)]
    for task in dict.fromkeys(tables["cost"]["task"]):
        of = {name: table[table["task"] == task] for name, table in tables.items()}
        parts: list[Part] = [
            Figure(figures[f"{name}_{task}"], caption)
            for name, caption in CAPTIONS.items()
            if f"{name}_{task}" in figures
        ]
        parts += [_exponents(of["exponents"]), *map(_costs, _by_model(of["cost"]))]
        sentences = [exponent_sentence(of["exponents"]), payoff_sentence(of["payoff"])]
        sentences.append(excess_sentence(of["accuracy"]))
        whole = of["accuracy"][of["accuracy"]["budget"].isna()]
        sentences.append(convergence_sentence(whole, "", "left_nats", "lower the converged gaps, in nats in sum,"))
        sections.append(Section(f"{task}: what importance costs", " ".join(filter(None, sentences)), parts))
    return sections


def study_methods_section(methods: tuple[str, ...]) -> Section:
    """What is measured of each method."""
    intro = (
        "A budget is counted for each component: an ablated pass of one prompt is one, a gradient three. The reference "
        "is the gap with constants that were fitted until they converged, on all test prompts. Seconds are those of "
        "one estimate alone, peak memory that of its process."
    )
    return Section("Cost of importance", intro, [Definitions({name: ESTIMATORS[name].note for name in methods})])


def exponent_sentence(exponents: pd.DataFrame) -> str:
    """How each method's cost grows."""
    rows = exponents[exponents["exponent"].notna()]
    said = []
    for quantity, of in rows.groupby("quantity", sort=False):
        each = [f"{row['method']} {human(Estimate(row['exponent'], row['se']))}" for row in of.to_dict("records")]
        said.append(f"{quantity}: {', '.join(each)}")
    return f"Exponents of cost over the number of weights, ± SE: {'; '.join(said)}." if said else ""


def payoff_sentence(payoff: pd.DataFrame) -> str:
    """From where on OA is worth its passes."""
    said = []
    for method, of in payoff.groupby("method", sort=False):
        each = [
            f"{row['model']} {human(int(row['budget'])) if pd.notna(row['budget']) else 'never'}"
            for row in of.to_dict("records")
        ]
        said.append(f"{method}: {', '.join(each)}")
    return f"Passes a component from which on OA is closer than {'; than '.join(said)}." if said else ""


def excess_sentence(accuracy: pd.DataFrame) -> str:
    """What short fits leave."""
    rows = accuracy[accuracy["budget"].notna() & accuracy["excess"].notna() & (accuracy["method"] == "optimal")]
    each = [
        f"{human(budget)} passes {three_digits(100 * of['excess'].median())}\u00a0%"
        for budget, of in rows.groupby("budget")
    ]
    return f"Optimal gaps above the converged ones, median over components and models: {', '.join(each)}." * bool(each)


def _members(facts: Mapping[str, Mapping[str, Any]], comparison: pd.DataFrame, report: Path) -> Section:
    trained = {name: of["held_out"] for name, of in facts.items() if "held_out" in of}
    links = {
        f"{name}: {of['model']}, {human(of['n_weights'])} weights": os.path.relpath(of["report"], report.parent)
        for name, of in facts.items()
    }
    parts: list[Part] = [Links(links, "Reports of the members")]
    if trained:
        parts.append(Definitions(trained, "What the trained ones know, held out"))
    parts += [
        Table(_wide(of, list(facts)), f"{task}, {str(measure).replace('_', ' ')}: a column for each member.", "optimal")
        for (task, measure), of in comparison.groupby(["task", "measure"], sort=False)
        if of["value"].notna().any()
    ]
    return Section("Members", "The same experiments on every member; a row for each method.", parts)


def _wide(comparison: pd.DataFrame, members: list[str]) -> pd.DataFrame:
    """A column for each member."""
    names = list(dict.fromkeys(comparison["method"].astype(str)))
    columns: dict[str, list[object]] = {"method": list(names)}
    for member in members:
        rows = comparison[comparison["model"] == member].set_index("method")
        columns[member] = [
            Estimate(float(rows["value"][name]), float(rows["se"][name])) if name in rows.index else None
            for name in names
        ]
    return pd.DataFrame(columns)


def _exponents(exponents: pd.DataFrame) -> Table:
    names = methods_in_order(exponents["method"])
    columns: dict[str, list[object]] = {"method": list(names)}
    for quantity, of in exponents.groupby("quantity", sort=False):
        rows = of.set_index("method")
        columns[str(quantity)] = [
            Estimate(float(rows["exponent"][name]), float(rows["se"][name])) if name in rows.index else None
            for name in names
        ]
    caption = "Exponents: slopes of the logarithm of cost over that of the number of weights, ± SE over members."
    return Table(pd.DataFrame(columns), caption, "optimal")


def _by_model(cost: pd.DataFrame) -> list[pd.DataFrame]:
    return [of for _, of in cost.groupby("model", sort=False)]


def _costs(cost: pd.DataFrame) -> Table:
    """One member's rows."""
    rows = cost.set_index("method").loc[methods_in_order(cost["method"])].reset_index()
    columns: dict[str, list[object]] = {"method": rows["method"].tolist()}
    for name in ("forward_passes", "backward_passes"):
        columns[name.replace("_", " ")] = [None if pd.isna(value) else int(value) for value in rows[name]]
    columns |= {"seconds": rows["seconds"].tolist(), "peak MB": rows["peak_mb"].tolist()}
    qualities = zip(rows["quality"], rows["quality_se"], strict=True)
    columns["quality"] = [Estimate(float(value), float(se)) for value, se in qualities]
    caption = (
        f"{cost['model'].iloc[0]}, {human(int(cost['n_weights'].iloc[0]))} weights: quality is the rank correlation "
        f"with the converged optimal gap ({WHOLE} is that itself), of circuit methods the ratio of their front's KL to "
        "that of UGS."
    )
    return Table(pd.DataFrame(columns, dtype=object), caption, "optimal")
