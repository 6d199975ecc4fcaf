"""The report's section on a convolutional network; what it says is computed from the tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from oacore.config.vision import MEASURES
from oacore.report.convergence import convergence_sentence
from oacore.report.numbers import Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

CAPTIONS = {
    "importance": "Importance of each unit with 95\u00a0% intervals over images, the most important by the reference "
    "first; values at or below 0 are drawn at the bottom.",
    "agreement": "Rank correlation over units with the reference, at equal numbers of forward passes, with 95\u00a0% "
    "intervals. Methods without a point can't be run within a budget.",
    "curves": "What is lost as units are replaced in each method's order, and as all but the first are.",
}


def vision_section(
    importance: pd.DataFrame,
    agreement: pd.DataFrame,
    curves: pd.DataFrame,
    sanity: pd.DataFrame,
    figures: Mapping[str, str],
    facts: Mapping[str, Any],
    reference: str,
) -> Section:
    """What was measured of each kind of units.

    Args:
        figures: names of `oacore.vision.plots.vision_figures` to SVG text.
        facts: of the network, as its model.json has them.
        reference: the Shapley values that others are compared with.
    """
    parts: list[Part] = [Definitions(_network(facts), "The network")]
    parts += [Figure(svg, _caption(name)) for name, svg in figures.items()]
    for kind in dict.fromkeys(agreement["units"]):
        of, its_curves, shuffled = (table[table["units"] == kind] for table in (agreement, curves, sanity))
        parts.append(_comparison(str(kind), of, its_curves, shuffled, reference))
    sentences = [size_sentence(importance, str(kind)) for kind in dict.fromkeys(importance["units"])]
    for kind in dict.fromkeys(agreement["units"]):
        of = agreement[agreement["units"] == kind]
        sentences += [agreement_sentence(of, str(kind), reference), budget_sentence(of, str(kind), reference)]
    sentences.append(sanity_sentence(sanity))
    sentences.append(
        convergence_sentence(_fits(importance), "", "left_nats", "move the loss that was fitted, in nats,")
    )
    images = Path(facts["pretrained"]["model"]).name if "pretrained" in facts else "digits"
    return Section(f"{images}: importance of a network's units", " ".join(filter(None, sentences)), parts)


def vision_methods_section(measures: Sequence[str]) -> Section:
    """What the importances are."""
    intro = (
        "An importance is a mean over test images x of KL( M(x) ‖ M_replaced(x) ) in nats, or a share of it; SE is the "
        "standard error over images. A forward pass is one image through the network, a gradient three of them; means, "
        "fits and clean passes are counted."
    )
    notes = {name: MEASURES[name].note for name in in_order(measures, MEASURES)}
    return Section("Importance of a network's units", intro, [Definitions(notes)])


def size_sentence(importance: pd.DataFrame, kind: str) -> str:
    """What the units of a kind cost one by one, and all together."""
    sums = importance[importance["units"] == kind].groupby("method", sort=False)["importance_nats"].sum()
    alone = [name for name in in_order(sums.index, MEASURES) if MEASURES[name].family == "ablation"]
    shares = [
        f"{name} {three_digits(sums[name])} of {three_digits(sums[f'shapley_{name}'])}"
        for name in alone
        if f"shapley_{name}" in sums
    ]
    return f"Replaced one by one, {kind} cost in sum, of the nats that all cost together: {'; '.join(shares)}."


def agreement_sentence(agreement: pd.DataFrame, kind: str, reference: str) -> str:
    """Which whole run orders units most as the reference does."""
    rows = agreement[(agreement["reference"] == reference) & agreement["budget"].isna()]
    rows = rows.sort_values("spearman", ascending=False, kind="stable")
    rows = rows[[MEASURES[name].family != "shapley" for name in rows["method"]]]
    said = "; ".join(
        f"{row['method']} {three_digits(row['spearman'])} ({three_digits(row['low'])} to {three_digits(row['high'])})"
        for row in rows.to_dict("records")
    )
    return f"Rank correlation of whole runs with {reference} over {kind}: {said}." if said else ""


def budget_sentence(agreement: pd.DataFrame, kind: str, reference: str) -> str:
    """Which method is closest to the reference at each budget."""
    rows = agreement[(agreement["reference"] == reference) & agreement["budget"].notna()]
    best = []
    for budget in sorted(set(rows["budget"])):
        of = rows[rows["budget"] == budget].sort_values("spearman", ascending=False, kind="stable").iloc[0]
        best.append(f"{human(int(budget))} passes, {of['method']} ({three_digits(of['spearman'])})")
    return f"Closest to it over {kind} with {'; with '.join(best)}." if best else ""


def sanity_sentence(sanity: pd.DataFrame) -> str:
    """How far importances are the same where the network means nothing."""
    rows = sanity[(sanity["randomised"] == "all") & sanity["spearman"].notna()]
    largest = []
    for kind, of in rows.groupby("units", sort=False):
        most = of.sort_values("spearman", ascending=False, kind="stable").iloc[0]
        largest.append(f"{three_digits(most['spearman'])} over {kind} ({most['method']})")
    if not largest:
        return ""
    return f"With all weights shuffled, the largest rank correlations with the trained network are {human(largest)}."


def _comparison(
    kind: str, agreement: pd.DataFrame, curves: pd.DataFrame, sanity: pd.DataFrame, reference: str
) -> Table:
    """A row for each method."""
    of_reference = agreement[agreement["reference"] == reference]
    whole, most = of_reference[of_reference["budget"].isna()], of_reference["budget"].max()
    methods = in_order(curves["method"], MEASURES)
    columns: dict[str, list[object]] = {"method": list(methods)}
    columns["forward passes"] = _column(whole, "forward_passes", methods)
    columns["rank correlation"] = _column(whole, "spearman", methods)
    at_most = of_reference[of_reference["budget"] == most]
    if len(at_most):
        columns["between seeds"] = _column(at_most, "between_seeds", methods)
    for replacement, rows in curves.drop_duplicates(["method", "replacement", "direction"]).groupby(
        "replacement", sort=False
    ):
        for direction, of in rows.groupby("direction", sort=False):
            areas = of.set_index("method").loc[methods]
            columns[f"{direction}, {replacement}"] = [
                Estimate(float(value), float(se))
                for value, se in zip(areas["area_nats"], areas["area_se_nats"], strict=True)
            ]
    for part, rows in sanity.groupby("randomised", sort=False):
        columns[f"shuffled: {part}"] = _column(rows, "spearman", methods)
    caption = (
        f"{kind}: rank correlation of whole runs with {reference}; "
        + ("that of two runs at the largest budget; " if len(at_most) else "")
        + "areas under the curves of deletion (high is good) and insertion (low is good) in nats ± SE; rank "
        "correlation with the importances of a network with shuffled weights."
    )
    return Table(pd.DataFrame(columns), caption, "optimal")


def _fits(importance: pd.DataFrame) -> pd.DataFrame:
    """A row for each fit: Shapley values of all units rest on the same one."""
    shared = importance["method"].map(lambda name: MEASURES[name].family == "shapley").astype(bool)
    return importance[~(shared & importance.duplicated(["units", "method"]))]


def _column(rows: pd.DataFrame, name: str, methods: Sequence[str]) -> list[object]:
    """A number of each method, None where it has no row."""
    by_method = dict(zip(rows["method"], rows[name].tolist(), strict=True))
    return [by_method.get(method) for method in methods]


def _network(facts: Mapping[str, Any]) -> dict[str, object]:
    return {
        **facts.get("pretrained", {}),
        "weights": facts["n_weights"],
        "images": facts["n_images"],
        "test accuracy": facts["accuracy"]["test"],
        "test loss in nats": facts["loss_nats"]["test"],
        "weight hash": facts["model_hash"][:16],
    }


def _caption(name: str) -> str:
    figure, _, kind = name.partition("_")
    return f"{CAPTIONS[figure]} Of {kind}."
