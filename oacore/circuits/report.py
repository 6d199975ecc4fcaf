"""The report's section on the circuits of one task; what it says is computed from the table of circuits."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from oacore.circuits.fronts import base_name, best_within, front_sizes, front_table, methods_in_order, with_loss
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, leading
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import WHOSE_SE, Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

PARETO = (
    "The lower and the further left a staircase, the better the method: of its circuits of at most that many edges, "
    "the one of the lowest loss on validation prompts, with its loss on test prompts. Bars are 95\u00a0% intervals; "
    "faint marks are circuits that another one of the same method beats."
)
ABLATION_TYPES = (
    "The same method under each ablation type: the lower a staircase, the fewer edges suffice, and the less of the "
    "loss is due to what the ablated edges carry instead."
)


def circuit_section(
    task: str,
    pareto: pd.DataFrame,
    fronts: pd.DataFrame,
    figures: Mapping[str, str],
    drawings: Mapping[str, str] | None = None,
    stability: pd.DataFrame | None = None,
) -> Section:
    """The section of one task: what the fronts say, Pareto figures, chosen circuits, drawings, stability.

    `fronts` is the table of `oacore.circuits.fronts.compare_fronts`;
    `figures` maps names of `circuit_plots.circuit_figures` to SVG text, `drawings` captions to text of
    `circuit_drawing.circuit_svg`; `stability` has one row per method, ablation and knob (method, ablation, knob,
    n_circuits, jaccard, jaccard_low, jaccard_high). Raises ValueError for a figure without a caption, and as
    `circuits.fronts.with_loss`.
    """
    captions = {name: _caption(name) for name in figures}
    pareto = with_loss(pareto)
    ablations = in_order(pareto["ablation"], EDGE_ABLATIONS)[::-1]  # optimal first
    parts: list[Part] = [Figure(figures[name], caption) for name, caption in captions.items()]
    parts += [_front_table(pareto, ablation) for ablation in ablations]
    parts.append(_chosen_table(pareto, ablations))
    parts += [Figure(svg, caption) for caption, svg in (drawings or {}).items()]
    if stability is not None and len(stability):
        parts.append(_stability_table(stability))
    return Section(f"{task}: circuits", _intro(pareto, fronts, ablations), parts)


def circuit_methods_section(methods: Sequence[str], ablations: Sequence[str]) -> Section:
    """What a circuit and its loss are, and each method and ablation type in one sentence."""
    intro = (
        "A circuit is a set of edges between the nodes of the model (its input, attention heads and MLPs, its logits); "
        "all other edges are ablated, at every position but the first (BOS), and edges that no longer lie on a path "
        "from input to logits do not count. Its loss is the mean over held-out prompts x of KL( M(x) ‖ M_circuit(x) ), "
        f"in nats, between the next-token distributions at the last position. {WHOSE_SE}"
    )
    notes = {
        method: CIRCUIT_METHODS[method].note for method in methods_in_order(pd.DataFrame({"method": list(methods)}))
    }
    types = {ablation: EDGE_ABLATIONS[ablation].note for ablation in in_order(ablations, EDGE_ABLATIONS)}
    return Section(
        "Circuits",
        intro,
        [Definitions(notes, "How circuits are found"), Definitions(types, "What ablated edges carry")],
    )


def front_sentence(fronts: pd.DataFrame, ablation: str, method: str = leading(CIRCUIT_METHODS)) -> str:
    """Against which methods the front of `method` is lower, against which not, and where not most; `fronts` is the
    table of `oacore.circuits.fronts.compare_fronts`.
    """
    rows = fronts[(fronts["ablation"] == ablation) & (fronts["method"] == method)] if len(fronts) else fronts
    if rows.empty:
        return f"There is no front to compare that of {method} with {ablation} ablation with."
    text = f"The front of {method} with {ablation} ablation (its KL over another's, the geometric mean over log size)"
    parts = []
    for verdict, wording in (("below", "is below {}"), ("undecided", "is not apart from {}"), ("above", "is above {}")):
        chosen = rows[rows["verdict"] == verdict]
        if len(chosen):
            parts.append(wording.format("; ".join(_against(row, verdict) for row in chosen.to_dict("records"))))
    apart = rows[rows["verdict"] == "apart"]
    if len(apart):
        parts.append(f"has no size in common with that of {', '.join(apart['other'])}")
    return f"{text} {'; it '.join(parts)}."


def _against(row: Mapping[Any, Any], verdict: str) -> str:
    """`acdc (0.91, 95 % interval 0.85 to 0.97, from 28 to 60 edges)`."""
    ratio, low, high = (three_digits(row[name]) for name in ("ratio", "low", "high"))
    text = f"{row['other']} ({ratio}, 95\u00a0% interval {low} to {high}, "
    sizes = [human(int(row[name])) for name in ("edges_low", "edges_high")]
    text += f"from {sizes[0]} to {sizes[1]} edges" if sizes[0] != sizes[1] else f"at {sizes[0]} edges"
    if verdict != "below" and row["largest_ratio"] > 1:
        text += f", most at {human(int(row['at_edges']))}, {three_digits(row['largest_ratio'])}"
    return text + ")"


def _intro(pareto: pd.DataFrame, fronts: pd.DataFrame, ablations: Sequence[str]) -> str:
    methods = methods_in_order(pareto)
    counts = [(len(pareto), "circuit"), (len(methods), "method"), (len(ablations), "ablation type")]
    first, *rest = (f"{human(count)} {noun}{'s' * (count != 1)}" for count, noun in counts)
    method = next((m for m in methods if not _is_baseline(m)), methods[0])
    sentences = []
    for ablation in ablations:
        circuits = pareto[pareto["ablation"] == ablation]
        if (circuits["method"] == method).any():
            fits = convergence_sentence(circuits, "kl_nats", "left_nats", "lower their KL")
            sentences.append(" ".join(filter(None, (front_sentence(fronts, ablation, method), fits))))
    return "\n\n".join([f"{first} of {' and '.join(rest)}. {sentences[0]}", *sentences[1:]])


def _is_baseline(method: str) -> bool:
    """Whether any other method must beat it."""
    name = base_name(method)
    return name in CIRCUIT_METHODS and CIRCUIT_METHODS[name].baseline


def _front_table(pareto: pd.DataFrame, ablation: str) -> Table:
    """One row per method, one column per size."""
    table = front_table(pareto)
    table = table[table["ablation"] == ablation]
    rows = []
    for method in methods_in_order(table):
        of_method = table[table["method"] == method]
        row: dict[str, object] = {"method": method}
        for size in dict.fromkeys(table["max_edges"]):
            at = of_method[of_method["max_edges"] == size]
            row[f"≤ {human(size)} edges"] = _estimate(at.iloc[0]) if len(at) else None
        ratios = of_method["ratio_to_best"].dropna()
        row["÷ best (median)"] = float(ratios.median()) if len(ratios) else None
        rows.append(row)
    caption = (
        f"Fronts under {ablation} ablation: within each size the circuit of lowest KL on validation prompts, with its "
        "KL ± SE in nats on test prompts, and their ratio to the best method's."
    )
    return Table(pd.DataFrame(rows), caption, leading(CIRCUIT_METHODS))


def _chosen_table(pareto: pd.DataFrame, ablations: Sequence[str]) -> Table:
    """Each method's best circuit within one size that the fronts of all ablation types were compared at."""
    sizes = front_sizes(pareto)
    limit = sizes[len(sizes) // 2]
    rows = []
    for ablation in ablations:
        circuits = pareto[pareto["ablation"] == ablation]
        for method in methods_in_order(circuits):
            best = best_within(circuits[circuits["method"] == method], limit)
            if best is not None:
                values = (
                    method,
                    ablation,
                    int(best["edges"]),
                    int(best["nodes"]),
                    _estimate(best),
                    float(best["logit_diff"]),
                    float(best["knob"]),
                )
                rows.append((*values, str(best["seed"])))
    columns = ["method", "ablation", "edges", "nodes", "KL (nats)", "logit difference", "knob", "seed"]
    return Table(
        pd.DataFrame(rows, columns=columns),
        f"Each method's circuit with at most {human(limit)} edges, chosen on validation prompts; KL ± SE.",
    )


def _estimate(circuit: pd.Series) -> Estimate:
    """A circuit's KL."""
    return Estimate(circuit["kl_nats"], circuit["se_nats"], finished=not unfinished(circuit.to_frame().T).item())


def _stability_table(stability: pd.DataFrame) -> Table:
    names = {
        "n_circuits": "circuits",
        "jaccard": "Jaccard index",
        "jaccard_low": "95\u00a0% from",
        "jaccard_high": "to",
    }
    table = stability[["method", "ablation", "knob", *names]].rename(columns=names)
    caption = (
        "How stable circuits are: mean Jaccard index of the edges of two circuits that differ in the seed alone; 1 "
        "means the same edges."
    )
    return Table(table.reset_index(drop=True), caption)


def _caption(name: str) -> str:
    if name.startswith("pareto_"):
        return PARETO.format(ablation=name.removeprefix("pareto_"))
    if name.startswith("ablation_types_"):
        return ABLATION_TYPES
    raise ValueError(f"figures: {name}; captions exist for pareto_{{ablation}} and ablation_types_{{method}}")
