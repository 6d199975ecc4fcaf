"""The report's section on effects and interactions of one task; what it says is computed from the tables."""

from collections.abc import Mapping, Sequence

import pandas as pd

from oacore.config.circuits import EDGE_ABLATIONS
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import SIGNIFICANT, WHOSE_SE, Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

NAMED_PAIRS = 3  # in a sentence
LISTED_PAIRS = 12  # in a table
MEASURES = {
    "total effect": "what ablating all edges out of a component costs",
    "direct effect": "what ablating its edge to the logits alone costs, while all that reads it sees its clean value",
    "indirect effect": "what ablating all its other edges costs; by mediator, only those into that component or layer",
    "interaction": "what ablating two components together costs beyond the sum of what each alone costs: above 0 they "
    "are redundant (either is enough, OR), below 0 they cooperate (both are needed, AND, or one acts through the "
    "other)",
    "self-repair": "direct less total effect: how much of what the direct path loses later components make up for once "
    "they see that the component is gone",
}
CAPTIONS = {
    "direct_against_total": "Direct over total effect of each component, with 95\u00a0% intervals. On the diagonal a "
    "component acts by itself; below it acts through others; above it others make up for its loss.",
    "interactions": "What each pair costs beyond the sum of its two: warm cells are redundant pairs, cold ones "
    "cooperate. Faint numbers are within two standard errors of 0.",
    "paths": "The paths whose ablation alone costs most, from components to what reads them.",
}


def interaction_section(
    task: str, effects: pd.DataFrame, paths: pd.DataFrame, interactions: pd.DataFrame, figures: Mapping[str, str]
) -> Section:
    """The section of one task: which pairs are redundant or cooperate, what other ablation types say, all figures, the
    effects.

    `figures` maps names of `oacore.interactions.plots.interaction_figures` to SVG text. Raises ValueError for a figure
    without a caption.
    """
    ablations = in_order(effects["method"], EDGE_ABLATIONS)[::-1]  # optimal first
    parts: list[Part] = [Figure(svg, _caption(name)) for name, svg in figures.items()]
    parts += [_effect_table(effects[effects["method"] == ablation], ablation) for ablation in ablations]
    if len(interactions):
        parts.append(_pair_table(interactions, ablations))
    sentences = [interaction_sentence(interactions, ablations[0]), repair_sentence(effects, ablations[0])]
    sentences += [spoofing_sentence(interactions, ablations[0], other) for other in ablations[1:]]
    sentences.append(convergence_sentence(interactions, "", "left_nats", "move interactions, in nats,"))
    return Section(f"{task}: effects and interactions", " ".join(filter(None, sentences)), parts)


def interaction_methods_section(ablations: Sequence[str]) -> Section:
    """What effects and interactions are."""
    intro = (
        "A loss is the mean over held-out prompts x of KL( M(x) ‖ M_ablated(x) ), in nats, between the next-token "
        "distributions at the last position; under optimal ablation every set of edges has optimal constants of its "
        f"own. Differences are taken prompt by prompt. {WHOSE_SE}"
    )
    types = {ablation: EDGE_ABLATIONS[ablation].note for ablation in in_order(ablations, EDGE_ABLATIONS)}
    return Section("Effects and interactions", intro, [Definitions(MEASURES), Definitions(types, "Ablated edges")])


def kinds(interactions: pd.DataFrame) -> pd.Series:
    """Of each pair: `redundant` or `cooperating` if its interaction is more than two standard errors from 0, else
    `undecided`.
    """
    value, error = interactions["interaction_nats"], SIGNIFICANT * interactions["se_nats"]
    kind = pd.Series("undecided", index=interactions.index)
    return kind.mask(value > error, "redundant").mask(value < -error, "cooperating")


def interaction_sentence(interactions: pd.DataFrame, ablation: str) -> str:
    """How many pairs are redundant, how many cooperate, and which most, under one ablation type."""
    pairs = interactions[interactions["method"] == ablation]
    if pairs.empty:
        return "There is no pair to compare."
    redundant, cooperating = (_most(pairs[kinds(pairs) == kind]) for kind in ("redundant", "cooperating"))
    return (
        f"Of {human(len(pairs))} pairs under {ablation} ablation, redundant: {redundant}; cooperating: {cooperating}; "
        "by more than two standard errors."
    )


def _most(pairs: pd.DataFrame) -> str:
    """How many pairs there are, and which interact most: `2 (most: a0.h1 and m3, 0.12 ± 0.01 nats)`."""
    order = pairs["interaction_nats"].abs().sort_values(ascending=False, kind="stable").index[:NAMED_PAIRS]
    named = "; ".join(
        f"{row['first']} and {row['second']}, {human(Estimate(row['interaction_nats'], row['se_nats']))}"
        for row in pairs.loc[order].to_dict("records")
    )
    return human(len(pairs)) + (f" (most: {named} nats)" if named else "")


def repair_sentence(effects: pd.DataFrame, ablation: str) -> str:
    """Whose direct loss later components make up for, and by how much, under one ablation type."""
    rows = effects[effects["method"] == ablation]
    repaired = rows[rows["self_repair_nats"] > SIGNIFICANT * rows["self_repair_se_nats"]]
    if repaired.empty:
        return "No component's direct loss is made up for by later ones."
    by = "; ".join(
        f"{row['component']}, {human(Estimate(row['self_repair_nats'], row['self_repair_se_nats']))} nats"
        for row in repaired.to_dict("records")
    )
    return f"Later components make up for direct losses of {by}."


def spoofing_sentence(interactions: pd.DataFrame, ablation: str, other: str) -> str:
    """On how many pairs another ablation type disagrees about the kind, and how many times as large it makes them."""
    ours, theirs = (
        interactions[interactions["method"] == name].set_index(["first", "second"]) for name in (ablation, other)
    )
    if ours.empty or theirs.empty:
        return ""
    own, found = kinds(ours), kinds(theirs).reindex(ours.index)
    opposite = ((own != found) & (own != "undecided") & (found != "undecided")).sum()
    typical, size = (pairs["interaction_nats"].abs().median() for pairs in (ours, theirs.reindex(ours.index)))
    times = f", and the median interaction is {three_digits(size / typical)} times as large" if typical > 0 else ""
    return (
        f"Under {other} ablation {human(int((own != found).sum()))} of these pairs come out as another kind, "
        f"{human(int(opposite))} of them as the opposite one{times}."
    )


def _estimates(rows: pd.DataFrame, quantity: str, error: str = "se_nats") -> list[Estimate]:
    """The cells of a column of a table."""
    cells = zip(rows[quantity], rows[error], ~unfinished(rows), strict=True)
    return [Estimate(float(value), float(se), bool(finished)) for value, se, finished in cells]


def _effect_table(effects: pd.DataFrame, ablation: str) -> Table:
    """A row for each component."""
    columns: dict[str, Sequence[object]] = {"component": effects["component"].tolist()}
    for quantity in ("total", "direct", "indirect", "self_repair"):
        columns[quantity.replace("_", "-")] = _estimates(effects, f"{quantity}_nats", f"{quantity}_se_nats")
    return Table(pd.DataFrame(columns), f"Effects under {ablation} ablation, in nats ± SE.")


def _pair_table(interactions: pd.DataFrame, ablations: Sequence[str]) -> Table:
    """The pairs of the largest interactions under the first ablation type, with what the others say."""
    by_type = {name: rows.set_index(["first", "second"]) for name, rows in interactions.groupby("method", sort=False)}
    sizes = by_type[ablations[0]]["interaction_nats"].abs().sort_values(ascending=False, kind="stable")
    shown = sizes.index[:LISTED_PAIRS]
    columns: dict[str, Sequence[object]] = {"pair": [f"{first} and {second}" for first, second in shown]}
    for name in ablations:
        columns[name] = _estimates(by_type[name].reindex(shown), "interaction_nats")
    caption = "The largest interactions, in nats ± SE: above 0 redundant, below 0 cooperating."
    return Table(pd.DataFrame(columns), caption, ablations[0])


def _caption(name: str) -> str:
    for begin, caption in CAPTIONS.items():
        if name == begin or name.startswith(f"{begin}_"):
            return f"{caption} Under {name.removeprefix(f'{begin}_')} ablation." if name != begin else caption
    raise ValueError(f"figures: {name}; captions exist for {', '.join(CAPTIONS)}")
