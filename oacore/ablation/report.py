"""The report's section on single-component ablation of one task."""

from collections.abc import Mapping, Sequence

import pandas as pd

from oacore.config.ablation import ABLATION_TYPES
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import WHOSE_SE, Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

CAPTIONS = {
    "gap_distributions": "The further left a strip, the less harm the replacement itself does: each point is the gap "
    "of one component, each bar the median of a method.",
    "optimal_against_counterfactual": "Below the diagonal one fitted constant does less harm than the component's "
    "activation on the counterfactual prompt, and the closer ρ is to 1, the more the two methods agree on which "
    "components matter.",
    "layer_head_heatmap": "The darker a cell, the more of what its component does on this task no constant can stand "
    "in for.",
    "convergence_curves": "Lines that have become flat before their dot show that the fits were finished, so that a "
    "gap above is not a matter of too few steps.",
}


# What a sentence sets side by side: the optimal constant of each kind, and methods whose values follow the position as
# little, or as much. The counterfactual value follows the prompt, so that it stands beside both.
LIKE_FOR_LIKE = (
    ("optimal", "optimal constant", ("zero", "mean", "resample", "counterfactual")),
    (
        "optimal_positional",
        "optimal constant of each position",
        ("zero", "mean_positional", "resample_positional", "counterfactual"),
    ),
)


def ablation_section(
    task: str,
    gaps: pd.DataFrame,
    summary: pd.DataFrame,
    figures: Mapping[str, str],
    example: Mapping[str, object] | None = None,
) -> Section:
    """The section of one task: headline, example, summary, figures and the components with the largest gaps.

    `gaps` and `summary` are the tables of the run, with any subset of the methods; `figures` maps names of
    `plots.ablation_figures` to SVG text; `example` is one prompt with its counterfactual and answer, by name.
    Raises ValueError for a figure without a caption.
    """
    if unknown := set(figures) - set(CAPTIONS):
        raise ValueError(f"figures: {', '.join(sorted(unknown))}; captions exist for {', '.join(CAPTIONS)}")
    parts: list[Part] = [Definitions(example, "An example prompt", verbatim=True)] if example else []
    parts.append(_summary_table(gaps, summary))
    parts += [Figure(figures[name], caption) for name, caption in CAPTIONS.items() if name in figures]
    parts.append(_top_table(gaps))
    return Section(task, _headline(gaps, summary), parts)


def methods_section(methods: Sequence[str]) -> Section:
    """What the gap is and what each of `methods` puts in a component's place, in one line each."""
    intro = (
        "The ablation loss gap of a component is the mean over prompts x of KL( M(x) ‖ M_ablated(x) ), in nats, "
        "between the next-token distributions at the last position: of the model as it is, and of the model with the "
        f"component's output replaced. The first position (BOS) is never replaced. {WHOSE_SE} The methods differ in "
        "the replacement only:"
    )
    return Section(
        "Methods", intro, [Definitions({name: ABLATION_TYPES[name].note for name in in_order(methods, ABLATION_TYPES)})]
    )


def _headline(gaps: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What was measured, and what optimal ablation gained over the plain methods."""
    prompts = sorted(set(gaps["n_prompts"]))
    span = human(prompts[0]) if len(prompts) == 1 else f"{human(prompts[0])} to {human(prompts[-1])}"
    text = f"{gaps['component'].nunique()} components, {span} prompts each."
    for optimal, constant, others in LIKE_FOR_LIKE:
        ratios = summary.set_index("method")[f"median_ratio_{optimal}_to_method"].astype(float).dropna()
        shares = [f"{three_digits(100 * ratios[name])}\u00a0% of {name}'s" for name in others if name in ratios]
        if shares:
            text += f" In the median component, the gap of the {constant} is {', '.join(shares)}."
    fits = convergence_sentence(gaps, "gap_nats", "left_nats", "lower their gap")
    return " ".join(filter(None, (text, fits)))


def _summary_table(gaps: pd.DataFrame, summary: pd.DataFrame) -> Table:
    by_method = gaps.groupby("method")["gap_nats"]
    table = pd.DataFrame({"components": by_method.count(), "median gap (nats)": by_method.median()})
    known = summary.set_index("method").astype(float)  # an empty column may hold None
    for optimal, *_ in LIKE_FOR_LIKE:
        table[f"{optimal} ÷ method (median, %)"] = 100 * known[f"median_ratio_{optimal}_to_method"]
    table["Spearman ρ with counterfactual"] = known["spearman_with_counterfactual"]
    table = (
        table.reindex(in_order(gaps["method"], ABLATION_TYPES))
        .dropna(axis="columns", how="all")
        .rename_axis("method")
        .reset_index()
    )
    return Table(table, "The methods, each over all components.", "optimal")


def _top_table(gaps: pd.DataFrame, count: int = 10) -> Table:
    methods = in_order(gaps["method"], ABLATION_TYPES)
    by = next((m for m in ("optimal", "optimal_positional", "counterfactual") if m in methods), methods[0])
    ranked = gaps[gaps["method"] == by].sort_values("gap_nats", ascending=False, kind="stable")["component"].head(count)
    columns: dict[str, list[object]] = {"component": list(ranked)}
    for method in [by, *(m for m in methods if m != by)]:
        rows = gaps[gaps["method"] == method].set_index("component").reindex(list(ranked))
        estimates = zip(rows["gap_nats"], rows["se_nats"], ~unfinished(rows), strict=True)
        columns[method] = [Estimate(*estimate) for estimate in estimates]
    return Table(
        pd.DataFrame(columns), f"The {len(ranked)} components with the largest {by} gap: gap ± SE in nats.", by
    )
