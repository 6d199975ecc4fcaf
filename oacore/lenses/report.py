"""The report's section on the lenses of one task; what it says is computed from the tables."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from oacore.config.lenses import HIGHLIGHTED, LENSES
from oacore.lenses.tables import (
    demonstrations_in_order,
    lens_rows,
    lenses_in_order,
    mean_over_datasets,
    perturbations_in_order,
)
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import WHOSE_SE, Estimate, human, verdict
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

CAPTIONS = {
    "loss": "The lower a line, the more of what the model will say can be read at that layer. Where OCA (orange) is "
    "below the tuned lens (blue), the model's own MLPs read it better than a fitted affine map does. Bands are "
    "95\u00a0% intervals.",
    "agreement": "The higher a line and the further left it rises, the earlier the lens names the model's own next "
    "token.",
    "lengths": "A flat line means that the lens also holds for contexts that it was not fitted on; one that rises "
    "away from where it was fitted has learned what is peculiar to that length.",
    "similarity": "How much a lens's output changes in the same direction as the model's if the residual stream is "
    "perturbed: near 1 the lens reads what the model uses, near 0 it reads something else. A panel per perturbation; "
    "bands are 95\u00a0% intervals.",
    "correlation": "Whether a lens's output changes more where the model's does: near 1 it is sensitive to the same "
    "perturbations, near 0 its response tells nothing of the model's. A panel per perturbation; bands are 95\u00a0% "
    "intervals.",
    "truthfulness": "A line above its own right end was closer to the right answer at an earlier layer than at the "
    "last: look for it under permuted demonstrations, whose wrong labels later layers copy. Bands are 95\u00a0% "
    "intervals.",
}
MEASURED = {
    "similarity": "Aitchison similarity of the changes of lens and model",
    "correlation": "Correlation of the log KLs of lens and model over all pairs of a perturbation and a prompt",
    "direction_correlation": "Correlation of their mean log KLs over prompts, one for each perturbation, as the "
    "authors take it",
}


def lens_section(
    task: str,
    loss: pd.DataFrame,
    figures: Mapping[str, str],
    drawings: Mapping[str, str],
    faithfulness: pd.DataFrame | None = None,
    truthfulness: pd.DataFrame | None = None,
) -> Section:
    """The section of one task: how the OCA lens compares, figures, tables, and drawn prompts.

    `figures` maps names of `oacore.lenses.plots.lens_figures` to SVG text, `drawings` captions to text of
    `oacore.lenses.drawing.token_grid_svg`. Raises ValueError for a figure without a caption, and as
    `oacore.lenses.tables.lens_rows`.
    """
    if unknown := set(figures) - set(CAPTIONS):
        raise ValueError(f"figures: {', '.join(sorted(unknown))}; captions exist for {', '.join(CAPTIONS)}")
    loss = lens_rows(loss, "kl_nats", "loss", ("se_nats", "n"))
    paragraphs = [_intro(loss)]
    parts: list[Part] = [Figure(figures[name], caption) for name, caption in CAPTIONS.items() if name in figures]
    parts.append(_loss_table(loss))
    if faithfulness is not None and len(faithfulness):
        for measure in MEASURED:
            if measure not in faithfulness or faithfulness[measure].notna().any():
                parts.append(_faithfulness_table(faithfulness, measure))
        paragraphs += faithfulness_sentences(faithfulness)
    if truthfulness is not None and len(truthfulness):
        means = mean_over_datasets(truthfulness)
        parts.append(_truthfulness_table(means))
        paragraphs += truthfulness_sentences(means)
    parts += [Figure(svg, caption) for caption, svg in drawings.items()]
    return Section(f"{task}: lenses", "\n\n".join(paragraphs), parts)


def lens_methods_section(lenses: Sequence[str]) -> Section:
    """What a lens and its loss are, and each lens in one sentence."""
    intro = (
        "A lens of layer l predicts the model's next-token distribution from the residual stream that enters block l, "
        "at the last position alone. Its loss is the mean over held-out prompts x of KL( M(x) ‖ lens(x) ), in nats. "
        f"{WHOSE_SE} The causal faithfulness of a lens is how its output follows the model's "
        "when that residual stream is perturbed: in direction (Aitchison similarity of the two changes) and in size "
        "(correlation of their log KLs)."
    )
    notes = {lens: LENSES[lens].note if lens in LENSES else "" for lens in in_order(lenses, LENSES)}
    return Section("Lenses", intro, [Definitions(notes)])


def compare_losses(loss: pd.DataFrame, other: str, lens: str = HIGHLIGHTED) -> pd.DataFrame:
    """The lens `own` against `other` at each layer at which both were measured, of either the init with the lowest KL
    there.

    Columns: layer; kl_nats, se_nats of `other`; own_kl_nats, own_se_nats; verdict: of `oacore.report.numbers.verdict`.
    """
    loss = lens_rows(loss, "kl_nats", "loss", ("se_nats",))
    of_lens, of_other = _best(loss, lens), _best(loss, other)
    rows = []
    for layer in of_lens.index.intersection(of_other.index).sort_values():
        (kl, se), (own_kl, own_se) = of_other.loc[layer], of_lens.loc[layer]
        rows.append((layer, kl, se, own_kl, own_se, verdict(own_kl, own_se, kl, se)))
    return pd.DataFrame(rows, columns=["layer", "kl_nats", "se_nats", "own_kl_nats", "own_se_nats", "verdict"])


def loss_sentence(loss: pd.DataFrame, other: str) -> str:
    """At how many layers, and where not, OCA's KL is below that of `other` by more than two standard errors; empty
    without such layers.
    """
    rows = compare_losses(loss, other)
    if rows.empty:
        return ""
    inits = loss.loc[(loss["lens"] == other) & loss["kl_nats"].notna(), "init"].nunique(dropna=False)
    whose = f"the {other} lens's" + (f" (the best of its {inits} fits at each layer)" if inits > 1 else "")
    below = rows["verdict"] == "below"
    text = (
        f"OCA's KL is below {whose} by more than two standard errors at {_share(int(below.sum()), len(rows), 'layer')}"
    )
    notes = []
    for kind, wording in (("above", "above it by more than that"), ("equal", "within two standard errors of it")):
        chosen = rows[rows["verdict"] == kind]
        notes += [f"{wording} at {_layers(chosen['layer'])}"] if len(chosen) else []
    if len(unknown := rows[rows["verdict"] == "undecided"]):
        notes.append(f"left open at {_layers(unknown['layer'])} for want of a standard error")
    if (rows["verdict"] == "above").any():
        above = rows[rows["verdict"] == "above"]
        worst = above.iloc[int((above["own_kl_nats"] - above["kl_nats"]).to_numpy().argmax())]
        ours, theirs = (Estimate(worst[f"{who}kl_nats"], worst[f"{who}se_nats"]) for who in ("own_", ""))
        notes.append(f"the most above at layer {worst['layer']:.0f}, {human(ours)} against {human(theirs)} nats")
    return "; ".join([text, *notes]) + "."


def faithfulness_sentences(faithfulness: pd.DataFrame) -> list[str]:
    """For each measure: at how many pairs of a perturbation and a layer OCA's interval lies above the tuned lens's best
    one's.
    """
    sentences = []
    for measure, name in (
        ("similarity", "in the same direction as the model"),
        ("correlation", "in proportion to the model's response"),
    ):
        if measure not in faithfulness or faithfulness[measure].isna().all():
            continue
        low, high = f"{measure}_low", f"{measure}_high"
        table = lens_rows(faithfulness, measure, "faithfulness", ("perturbation", low, high)).sort_values(
            measure, kind="stable"
        )
        keys = ["perturbation", "layer"]
        oca, tuned = (
            table[table["lens"] == lens].drop_duplicates(keys, keep="last").set_index(keys)[[low, high]]
            for lens in (HIGHLIGHTED, "tuned")
        )
        both = oca.join(tuned, how="inner", rsuffix="_tuned")
        if both.empty:
            continue
        above, below = int((both[low] > both[f"{high}_tuned"]).sum()), int((both[high] < both[f"{low}_tuned"]).sum())
        sentences.append(
            f"When the residual stream is perturbed, OCA responds {name} more than the tuned lens ({measure}, "
            f"95\u00a0% intervals apart) at {_share(above, len(both), 'pair')} of a perturbation and a layer, and less "
            f"at {below}."
        )
    return sentences


def truthfulness_sentences(means: pd.DataFrame) -> list[str]:
    """For each kind of demonstrations, OCA's best layer against its last one; `means` as of
    `oacore.lenses.tables.mean_over_datasets`.
    """
    sentences = []
    for kind in demonstrations_in_order(means):
        rows = means[(means["demonstrations"] == kind) & (means["lens"] == HIGHLIGHTED)].sort_values(
            "layer", kind="stable"
        )
        if len(rows) < 2:
            continue
        best, last = rows.iloc[int(rows["accuracy"].to_numpy().argmax())], rows.iloc[-1]
        text = (
            f"With {kind} demonstrations, OCA answers best at layer {best['layer']} ({_percent(best)}\u00a0% "
            "calibrated accuracy"
        )
        sentences.append(
            text + (", its last)." if best["layer"] == last["layer"] else f"; {_percent(last)}\u00a0% at its last).")
        )
    return sentences


def _intro(loss: pd.DataFrame) -> str:
    """What was measured, and how OCA compares with the tuned and the logit lens."""
    prompts = sorted(set(loss["n"].dropna()))
    span = (
        "an unknown number of"
        if not prompts
        else " to ".join(human(int(n)) for n in dict.fromkeys([prompts[0], prompts[-1]]))
    )
    layers, lenses = loss["layer"].nunique(), loss["lens"].nunique()
    text = (
        f"{lenses} lens{'es' * (lenses != 1)} at {layers} layer{'s' * (layers != 1)}, each on {span} held-out prompts."
    )
    sentences = [loss_sentence(loss, other) for other in ("tuned", "logit")]
    sentences.append(convergence_sentence(loss, "kl_nats", "left_nats", "lower their KL"))
    return " ".join([text, *filter(None, sentences)])


def _best(loss: pd.DataFrame, lens: str) -> pd.DataFrame:
    """KL and standard error by layer, of the init with the lowest KL."""
    rows = loss[loss["lens"] == lens].sort_values("kl_nats", kind="stable").drop_duplicates("layer")
    return rows.set_index("layer")[["kl_nats", "se_nats"]]


def _loss_table(loss: pd.DataFrame) -> Table:
    """One row per layer, one column per lens."""
    names = lenses_in_order(loss)
    estimates = zip(loss["kl_nats"], loss["se_nats"], ~unfinished(loss), strict=True)
    cells = dict(
        zip(zip(loss["name"], loss["layer"], strict=True), (Estimate(*each) for each in estimates), strict=True)
    )
    rows = [
        {"layer": int(layer)} | {name: cells.get((name, layer)) for name in names}
        for layer in sorted(set(loss["layer"]))
    ]
    return Table(pd.DataFrame(rows, dtype=object), "KL ± SE in nats of each lens at each layer.", HIGHLIGHTED)


def _faithfulness_table(faithfulness: pd.DataFrame, measure: str) -> Table:
    """One row per perturbation, one column per lens."""
    table = lens_rows(faithfulness, measure, "faithfulness", ("perturbation",))
    means = table.pivot_table(index="perturbation", columns="name", values=measure)
    frame = (
        means.loc[perturbations_in_order(table), lenses_in_order(table)].rename_axis(None, axis="columns").reset_index()
    )
    caption = f"{MEASURED[measure]}, the mean of all layers that the lens was measured at."
    return Table(frame, caption, HIGHLIGHTED)


def _truthfulness_table(means: pd.DataFrame) -> Table:
    rows = []
    for name in lenses_in_order(means):
        row: dict[str, object] = {"lens": name}
        for kind in demonstrations_in_order(means):
            curve = means[(means["name"] == name) & (means["demonstrations"] == kind)].sort_values(
                "layer", kind="stable"
            )
            if curve.empty:
                continue
            best, last = curve.iloc[int(curve["accuracy"].to_numpy().argmax())], curve.iloc[-1]
            row[f"{kind}: best (%)"] = Estimate(100 * best["accuracy"], 100 * best["se"])
            row[f"{kind}: at layer"] = int(best["layer"])
            row[f"{kind}: last layer (%)"] = Estimate(100 * last["accuracy"], 100 * last["se"])
        rows.append(row)
    frame = pd.DataFrame(rows, dtype=object)
    count = int(means["datasets"].iloc[0])
    caption = (
        f"Calibrated accuracy ± SE, the mean of {count} data set{'s' * (count != 1)}, with true and with permuted "
        "labels in the demonstrations. The best layer is chosen on the same prompts, so that its accuracy is a little "
        "too high."
    )
    return Table(frame.astype(object).where(frame.notna(), None), caption, HIGHLIGHTED)


def _percent(row: pd.Series) -> str:
    return human(Estimate(100 * row["accuracy"], 100 * row["se"]))


def _share(count: int, total: int, noun: str) -> str:
    """`all 12 layers`, `3 of 12 layers`, `none of 12 layers`."""
    nouns = f"{noun}{'s' * (total != 1)}"
    if count == total:
        return f"all {total} {nouns}" if total > 1 else f"the one {noun}"
    return f"{count or 'none'} of {total} {nouns}"


def _layers(layers: Iterable[float]) -> str:
    """`layer 3`, `layers 0, 4 to 7`."""
    numbers = sorted(int(layer) for layer in layers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [", ".join(map(str, run)) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"layer{'s' * (len(numbers) != 1)} {', '.join(texts)}"
