"""The report's section on behaviour removal; what it says is computed from the table."""

from collections.abc import Mapping, Sequence

import pandas as pd

from oacore.config.circuits import EDGE_ABLATIONS
from oacore.config.removal import REMOVAL_METHODS
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import WHOSE_SE, Estimate, human
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order

GONE = 0.5  # of the accuracy before: what falls short of it has not removed the behaviour
MEASURES = {
    "forgotten accuracy": "the share of prompts on which a right answer is more likely than every wrong one",
    "retained KL": "E KL( M(x) ‖ M_ablated(x) ) on the prompts of the retained tasks, the mean over tasks",
    "paraphrases, held-out tasks": "other wordings of what is forgotten, and other tasks to keep, that learning never "
    "saw",
    "steps to relearn": "of fine-tuning on a few forgotten prompts, with the ablation in place, until 90 % of the "
    "accuracy is back: what comes back at once was only suppressed",
}
CAPTIONS = {
    "front": "The lower and the further left, the better: what is forgotten, and what that costs on retained tasks, "
    "with 95\u00a0% intervals. Numbers count ablated edges, components or directions; the line is the accuracy before.",
    "held_out": "What learning did not see against what it saw. Above the diagonal an ablation does worse there: "
    "paraphrases are still answered, or held-out tasks suffer more.",
    "relearning": "The highest accuracy on forgotten prompts while a few others of them are fine-tuned on, over the "
    "accuracy before. Full marks were back at 90\u00a0% of what it was without an ablation; the number is of steps.",
}


def removal_section(forget: str, front: pd.DataFrame, figures: Mapping[str, str]) -> Section:
    """What is forgotten at what cost, by each method's ablation of the lowest loss on validation prompts.

    Args:
        forget: the forgotten task in words.
        figures: names of `oacore.removal.plots.removal_figures` to SVG text. ValueError for one without a caption.
    """
    ablations = in_order(front["ablation"], EDGE_ABLATIONS)[::-1]  # optimal first
    best = chosen(front)
    parts: list[Part] = [Figure(svg, _caption(name)) for name, svg in figures.items()]
    parts.append(_table(best, ablations))
    before = human(float(front["accuracy_before"].iloc[0]))
    sentences = [f"Forgotten: {forget}. Without an ablation the accuracy on its test prompts is {before}."]
    sentences += [cost_sentence(best, ablation) for ablation in ablations]
    sentences += [held_out_sentence(best), relearning_sentence(best)]
    sentences.append(convergence_sentence(front, "", "left_nats", "lower the removal loss, in nats,"))
    return Section("Behaviour removal", " ".join(filter(None, sentences)), parts)


def removal_methods_section(methods: Sequence[str], ablations: Sequence[str]) -> Section:
    """What is measured, each method and what takes the place of what is ablated."""
    intro = (
        "An ablation replaces edges, components or directions of the residual stream by constants, learned on the "
        "sum of retained KL and, times a weight, forgotten log odds above chance; fitted constants have the same loss. "
        f"All numbers are of test prompts. {WHOSE_SE}"
    )
    notes = {method: REMOVAL_METHODS[method].note for method in in_order(methods, REMOVAL_METHODS)}
    types = {ablation: EDGE_ABLATIONS[ablation].note for ablation in in_order(ablations, EDGE_ABLATIONS)}
    parts = [Definitions(MEASURES), Definitions(notes, "What is ablated"), Definitions(types, "Ablated edges")]
    return Section("Behaviour removal", intro, parts)


def chosen(front: pd.DataFrame) -> pd.DataFrame:
    """Of each method and ablation type the ablation of the lowest loss on validation prompts."""
    index = front.groupby(["method", "ablation"], sort=False)["validation_loss_nats"].idxmin()
    return front.loc[index].reset_index(drop=True)


def cost_sentence(best: pd.DataFrame, ablation: str) -> str:
    """Which method halves the forgotten accuracy at the least cost under one ablation type, and which do not."""
    rows = best[best["ablation"] == ablation]
    gone = rows[rows["forget_accuracy"] <= GONE * rows["accuracy_before"]]
    if gone.empty:
        return f"Under {ablation} ablation no method halves that."
    least = gone.sort_values("retain_kl_nats", kind="stable").iloc[0]
    others = [name for name in rows["method"] if name not in set(gone["method"])]
    do = "does" if len(others) == 1 else "do"
    return (
        f"Under {ablation} ablation {least['method']} costs least: with "
        f"{_counted(int(least['ablations']), least['method'])} the accuracy is "
        f"{human(Estimate(least['forget_accuracy'], least['forget_se']))} at a retained KL of "
        f"{human(Estimate(least['retain_kl_nats'], least['retain_se']))} nats, the lowest of the methods that halve "
        f"the accuracy{f'; {human(others)} {do} not' if others else ''}."
    )


def held_out_sentence(best: pd.DataFrame) -> str:
    """How far paraphrases and held-out tasks follow, as medians over the ablations that halve the accuracy."""
    gone = best[best["forget_accuracy"] <= GONE * best["accuracy_before"]]
    parts = []
    if gone["paraphrase_accuracy"].notna().any():
        parts.append(
            f"paraphrases are answered with an accuracy of {human(float(gone['paraphrase_accuracy'].median()))} "
            f"(forgotten prompts: {human(float(gone['forget_accuracy'].median()))})"
        )
    if gone["held_out_kl_nats"].notna().any():
        parts.append(
            f"held-out tasks have a KL of {human(float(gone['held_out_kl_nats'].median()))} nats "
            f"(retained ones: {human(float(gone['retain_kl_nats'].median()))})"
        )
    return f"In the median of the ablations that halve it, {' and '.join(parts)}." if parts else ""


def relearning_sentence(best: pd.DataFrame) -> str:
    """How many of the ablations that halve the accuracy fine-tuning brings back."""
    gone = best[(best["forget_accuracy"] <= GONE * best["accuracy_before"]) & best["relearn_steps"].notna()]
    if gone.empty:
        return ""
    back = gone[gone["relearned"]]
    said = f", in the median after {back['relearn_steps'].median():g} steps" if len(back) else ""
    return f"Of the {len(gone)} of these that can be fine-tuned it brings the behaviour back in {len(back)}{said}."


def _counted(n: int, method: str) -> str:
    return f"{human(n)} {REMOVAL_METHODS[method].unit}{'s' * (n != 1)}"


def _table(best: pd.DataFrame, ablations: Sequence[str]) -> Table:
    """A row for each method and ablation type."""
    order = [(a, m) for a in ablations for m in in_order(best["method"], REMOVAL_METHODS)]
    rows = best.set_index(["ablation", "method"]).reindex(order).dropna(subset="ablations").reset_index()
    columns: dict[str, Sequence[object]] = {
        "method": rows["method"].tolist(),
        "ablation": rows["ablation"].tolist(),
        "ablated": [_counted(int(n), m) for n, m in zip(rows["ablations"], rows["method"], strict=True)],
    }
    names = {
        "forgotten accuracy": ("forget_accuracy", "forget_se"),
        "on paraphrases": ("paraphrase_accuracy", "paraphrase_se"),
        "retained KL": ("retain_kl_nats", "retain_se"),
        "held-out KL": ("held_out_kl_nats", "held_out_se"),
    }
    finished = ~unfinished(rows)
    for name, (value, error) in names.items():
        if rows[value].notna().any():
            cells = zip(rows[value], rows[error], finished, strict=True)
            columns[name] = [Estimate(float(mean), float(se), bool(done)) for mean, se, done in cells]
    if rows["relearn_steps"].notna().any():
        again = zip(rows["relearn_steps"], rows["relearned"], strict=True)
        columns["steps to relearn"] = [
            None if pd.isna(n) else f"{int(n)}" if back else f"> {int(n)}" for n, back in again
        ]
    return Table(pd.DataFrame(columns), "Each method's ablation of the lowest loss on validation prompts; ± SE.", "ugs")


def _caption(name: str) -> str:
    for begin, caption in CAPTIONS.items():
        if name == begin or name.startswith(f"{begin}_"):
            return f"{caption} Under {name.removeprefix(f'{begin}_')} ablation." if name != begin else caption
    raise ValueError(f"figures: {name}; captions exist for {', '.join(CAPTIONS)}")
