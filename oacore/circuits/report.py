"""The report's section on the circuits of one task; what it says is computed from the table of circuits."""

from collections.abc import Mapping, Sequence

import pandas as pd

from oacore.circuits.plots import compare_fronts, front_kl_at, front_sizes, front_table, methods_in_order, with_loss
from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS, leading
from oacore.report.numbers import WHOSE_SE, Estimate, human
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

PARETO = (
    "The lower and the further left a staircase, the better the method: it is the lowest loss reached with {ablation} "
    "ablation by circuits of at most that many edges. Bars are 95\u00a0% intervals; faint marks are circuits that "
    "another one of the same method beats."
)
ABLATION_TYPES = (
    "The same method under each ablation type: the lower a staircase, the fewer edges suffice, and the less of the "
    "loss is due to what the ablated edges carry instead."
)


def circuit_section(
    task: str,
    pareto: pd.DataFrame,
    figures: Mapping[str, str],
    drawings: Mapping[str, str] | None = None,
    stability: pd.DataFrame | None = None,
) -> Section:
    """The section of one task: what the fronts say, Pareto figures, chosen circuits, drawings, stability.

    `figures` maps names of `circuit_plots.circuit_figures` to SVG text, `drawings` captions to text of
    `circuit_drawing.circuit_svg`; `stability` has one row per method, ablation and knob (method, ablation, knob,
    n_circuits, jaccard, jaccard_low, jaccard_high). Raises ValueError for a figure without a caption, and as
    `circuits.plots.with_loss`.
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
    return Section(f"{task}: circuits", _intro(pareto, ablations), parts)


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


def front_sentence(pareto: pd.DataFrame, ablation: str, method: str = leading(CIRCUIT_METHODS)) -> str:
    """Is the front of `method` at or below every other method's under this ablation type, and where is it not?

    Differences count beyond `plots.SIGNIFICANT` standard errors; see `circuit_plots.compare_fronts`.
    """
    rows = compare_fronts(pareto, ablation, method)
    name = f"{method} with {ablation} ablation"
    if rows.empty:
        return f"There is no front to compare that of {name} with."
    decided = rows[rows["verdict"].isin(["below", "equal", "above"])]
    above = decided[decided["verdict"] == "above"]
    notes = []
    if decided.empty:
        text = f"The front of {name} cannot be compared with another"
    elif above.empty:
        below = int((decided["verdict"] == "below").sum())
        text = (
            f"The front of {name} is at or below every other method's ({_list(decided['method'])}): of the "
            f"{_count(decided)} there, none has a lower loss, by more than two standard errors, than {method} within "
            f"as many edges, and {below} {_have(below)} a higher one"
        )
    else:
        others = [other for other in dict.fromkeys(decided["method"]) if other not in set(above["method"])]
        places = "; ".join(_above(other, above, decided) for other in dict.fromkeys(above["method"]))
        text = (
            f"The front of {name} is not at or below every other method's: it is above, by more than two standard "
            f"errors, {places}"
        )
        notes += [f"it is at or below the front of {_list(others)}"] if others else []
    if len(unknown := rows[rows["verdict"] == "undecided"]):
        notes.append(f"left open for want of a standard error: {_count(unknown)} of {_list(unknown['method'])}")
    if len(smaller := rows[rows["verdict"] == "none"]):
        notes.append(f"not compared: {_count(smaller)} of {_list(smaller['method'])}, smaller than any of {method}")
    return "; ".join([text, *notes]) + "."


def _above(other: str, above: pd.DataFrame, decided: pd.DataFrame) -> str:
    """`at 2 of 8 front circuits of acdc, most at 97 edges (0.300 ± 0.010 against 0.220 ± 0.020 nats)`."""
    rows = above[above["method"] == other]
    worst = rows.iloc[int((rows["own_kl_nats"] - rows["kl_nats"]).to_numpy().argmax())]
    of_method, of_other = (Estimate(worst[f"{who}kl_nats"], worst[f"{who}se_nats"]) for who in ("own_", ""))
    total = int((decided["method"] == other).sum())
    circuits = f"{len(rows)} of {total} front circuits of {other}" if total > 1 else f"the one front circuit of {other}"
    where = f"{'most ' * (len(rows) > 1)}at {human(int(worst['edges']))} edges"
    return f"at {circuits}, {where} ({human(of_method)} against {human(of_other)} nats)"


def _intro(pareto: pd.DataFrame, ablations: Sequence[str]) -> str:
    methods = methods_in_order(pareto)
    counts = [(len(pareto), "circuit"), (len(methods), "method"), (len(ablations), "ablation type")]
    first, *rest = (f"{human(count)} {noun}{'s' * (count != 1)}" for count, noun in counts)
    method = next((m for m in methods if not _is_baseline(m)), methods[0])
    sentences = [front_sentence(pareto, ablation, method) for ablation in ablations if _has(pareto, ablation, method)]
    return "\n\n".join([f"{first} of {' and '.join(rest)}. {sentences[0]}", *sentences[1:]])


def _is_baseline(method: str) -> bool:
    """Whether any other method must beat it."""
    name = method.partition(" (")[0]
    return name in CIRCUIT_METHODS and CIRCUIT_METHODS[name].baseline


def _has(pareto: pd.DataFrame, ablation: str, method: str) -> bool:
    return bool(((pareto["ablation"] == ablation) & (pareto["method"] == method)).any())


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
            row[f"≤ {human(size)} edges"] = Estimate(at["kl_nats"].item(), at["se_nats"].item()) if len(at) else None
        ratios = of_method["ratio_to_best"].dropna()
        row["÷ best (median)"] = float(ratios.median()) if len(ratios) else None
        rows.append(row)
    caption = (
        f"Fronts under {ablation} ablation: lowest KL ± SE in nats within each size, and its ratio to the best "
        "method's there."
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
            best = front_kl_at(circuits[circuits["method"] == method], limit)
            if best is not None:
                loss = Estimate(best["kl_nats"], best["se_nats"])
                values = (
                    method,
                    ablation,
                    int(best["edges"]),
                    int(best["nodes"]),
                    loss,
                    float(best["logit_diff"]),
                    float(best["knob"]),
                )
                rows.append((*values, str(best["seed"])))
    columns = ["method", "ablation", "edges", "nodes", "KL (nats)", "logit difference", "knob", "seed"]
    return Table(
        pd.DataFrame(rows, columns=columns),
        f"Each method's circuit of lowest KL ± SE with at most {human(limit)} edges.",
    )


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


def _list(names: Sequence[str] | pd.Series) -> str:
    return ", ".join(dict.fromkeys(names))


def _count(rows: pd.DataFrame) -> str:
    return f"{len(rows)} front circuit{'s' * (len(rows) != 1)}"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
