"""The report's section on causal tracing; what it says is computed from the table of average indirect effects."""

from collections.abc import Mapping, Sequence

import pandas as pd

from oacore.config.tracing import CORRUPTIONS, POSITIONS, SITES, corruptions_in_order, kind_and_scale, usual_noise
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import Estimate, human, three_digits
from oacore.report.parts import Definitions, Figure, Part, Section, Table
from oacore.report.series import in_order
from oacore.tracing.peaks import peak_table
from oacore.tracing.tables import PICTURE_COLUMNS, traced_rows

BEST = next(iter(CORRUPTIONS))  # reports begin with it, and tables show it in bold
MEASURES = {
    "AIE": "Average indirect effect of restoring a place: the mean over held-out facts of p(answer) in the run that "
    "is corrupted but for that place, less p(answer) in the fully corrupted run. SE is its standard error over "
    "subjects.",
    "restored place": "What one site (attention output, MLP output, block output) writes at some tokens in a window "
    "of consecutive layers, set to what it was in the clean run; a window is named by the layer in its middle, and "
    "cut off at the ends of the model.",
    "normalised AIE": "1 − E max(0, p_clean − p_restored) / E(p_clean − p_corrupted): the share of the lost "
    "probability that comes back, not counting what is above the clean run's.",
    "share at peak": "The AIE at the peak over the sum of all positive AIEs of the same curve: 1 if one layer has all "
    "of it.",
}
AIE = (
    "Each line is the AIE of restoring the {site} around one layer; look for where it peaks, and how narrowly. Noise "
    "and means tell the model something wrong about the subject, and a place that undoes such harm has an effect too; "
    "of all constants, that of optimal ablation does the least. Bands are 95\u00a0% intervals."
)
NOISE_SCALES = (
    "Where lines of different shades peak at the same layers, the place found does not hinge on how strong the noise "
    "is; where they part, the choice of a scale decides. Dashed: one standard deviation for all coordinates. Bands are "
    "95\u00a0% intervals."
)
FACT = (
    "The darker a cell, the closer to the clean run the probability of the answer is when that token's output is "
    "restored there; * marks the subject's tokens, and p beside each corruption is the probability when nothing is "
    "restored."
)


def traced_counts(counts: Mapping[str, int]) -> str:
    """How many facts of a split were traced, and why not the others of the file.

    `counts`: of the split, in facts.json; which of them there are depends on the task.
    """
    reasons = {
        "n_wrong": "the model gets wrong",
        "n_not_completed": "it does not complete" if "n_wrong" in counts else "the model does not complete",
        "n_no_counterfactual": "have no other subject of the same length",
        "n_unaligned": "have a corrupt prompt of another length",
    }
    why = [f"{counts[name]} {reason}" for name, reason in reasons.items() if counts.get(name)]
    of_file = f"{counts['n_traced']} traced of {counts['n_rows']} in the file"
    return "; ".join([of_file, ", ".join(why)]) if why else of_file


def tracing_section(
    task: str,
    aie: pd.DataFrame,
    figures: Mapping[str, str],
    counts: Mapping[str, object] | None = None,
    pictures: pd.DataFrame | None = None,
) -> Section:
    """A task's section of causal tracing: where the effects peak, what each corruption leaves, all figures, and every
    curve's peak.

    `figures` maps names of `oacore.tracing.plots.tracing_figures` to SVG text, `counts` what there are numbers of to
    these numbers; `pictures` is the table that the figures of single facts were drawn from, for their captions.
    Raises ValueError for a figure without a caption, and as `oacore.tracing.tables.traced_rows`.
    """
    aie = traced_rows(aie)
    captions = {name: _caption(name, pictures) for name in figures}
    peaks = peak_table(aie)
    parts: list[Part] = [Definitions(counts, "Facts")] if counts else []
    parts.append(_probability_table(aie))
    parts += [Figure(figures[name], caption) for name, caption in captions.items()]
    for site in in_order(peaks["site"], SITES):
        parts += [_peak_table(peaks, site, window) for window in sorted(set(peaks["window"][peaks["site"] == site]))]
    return Section(f"{task}: causal tracing", _intro(aie, peaks), parts)


def tracing_methods_section(corruptions: Sequence[str]) -> Section:
    """What causal tracing measures, and what each of `corruptions` (as tables name them) does to the subject, in a
    sentence each.
    """
    intro = (
        "Causal tracing asks where the model recalls a fact. It runs each prompt three times: clean; corrupted, with "
        "the embeddings of the subject's tokens replaced; and corrupted with one place restored."
    )
    notes = {}
    for name in corruptions_in_order(corruptions):
        kind, scale = kind_and_scale(name)
        notes[name] = CORRUPTIONS[kind].note.format(scale=f"{scale:g}") if kind in CORRUPTIONS else ""
    return Section(
        "Causal tracing",
        intro,
        [Definitions(MEASURES, "What is measured"), Definitions(notes, "What replaces the subject")],
    )


def peak_sentence(peaks: pd.DataFrame, site: str) -> str:
    """Where the AIE of one site is largest at the narrowest window: with optimal ablation, beside the usual noise at
    its own peak.

    `peaks`: the table of `oacore.tracing.peaks.peak_table`. Without optimal ablation, the first corruption there is
    takes its place.
    """
    rows = peaks[peaks["site"] == site]
    rows = rows[rows["window"] == rows["window"].min()]
    names = corruptions_in_order(rows["corruption"])
    chosen = list(dict.fromkeys([names[0], usual_noise(names) or names[0]]))
    best = [(name, rows.loc[rows["aie"][rows["corruption"] == name].idxmax()]) for name in chosen]
    window = int(rows["window"].iloc[0])
    width = "one layer" if window == 1 else f"a window of {window} layers"
    text = f"The largest AIE of restoring the {SITES.get(site, site)} of {width} is, {_where(*best[0])}"
    return "; ".join([text, *(_where(*item) for item in best[1:])]) + "."


def _where(corruption: str, peak: pd.Series) -> str:
    """`with oat, at layer 3, last token (0.120 ± 0.010, 61.0 % of the positive effect along the layers)`."""
    share = float(peak["concentration"])
    of_all = "" if pd.isna(share) else f", {three_digits(100 * share)}\u00a0% of the positive effect along the layers"
    value = human(Estimate(float(peak["aie"]), float(peak["se"])))
    position = POSITIONS.get(str(peak["position"]), str(peak["position"]))
    return f"with {corruption}, at layer {int(peak['peak_layer'])}, {position} ({value}{of_all})"


def _intro(aie: pd.DataFrame, peaks: pd.DataFrame) -> str:
    names = corruptions_in_order(aie["corruption"])
    chosen = list(dict.fromkeys([names[0], usual_noise(names) or names[0]]))
    numbers = sorted(set(aie["n"]))
    count = " to ".join(human(int(number)) for number in dict.fromkeys((numbers[0], numbers[-1])))
    left = " and ".join(f"{three_digits(_mean(aie, name, 'p_corrupted'))} with {name}" for name in chosen)
    facts = "fact" if numbers == [1] else "facts"
    text = (
        f"{count} held-out {facts}, {len(names)} corruption{'s' * (len(names) != 1)}. The mean probability of the "
        f"answer is {three_digits(_mean(aie, names[0], 'p_clean'))} in the clean run, and {left} in the corrupted one."
    )
    fits = convergence_sentence(aie, "", "left", "move their AIE")
    return "\n\n".join(
        [" ".join(filter(None, (text, fits))), *(peak_sentence(peaks, site) for site in in_order(peaks["site"], SITES))]
    )


def _mean(aie: pd.DataFrame, corruption: str, column: str) -> float:
    """Of what is the same in all rows of a corruption."""
    return float(aie[column][aie["corruption"] == corruption].mean())


def _probability_table(aie: pd.DataFrame) -> Table:
    names = corruptions_in_order(aie["corruption"])
    columns = {"corruption": names, "facts": [int(aie["n"][aie["corruption"] == name].max()) for name in names]}
    columns |= {f"p, {run}": [_mean(aie, name, f"p_{run}") for name in names] for run in ("clean", "corrupted")}
    return Table(
        pd.DataFrame(columns),
        "Mean probability of the answer before and after each corruption, with nothing restored.",
        BEST,
    )


def _peak_table(peaks: pd.DataFrame, site: str, window: int) -> Table:
    """The peaks of one site and window, a row per position and corruption."""
    rows = peaks[(peaks["site"] == site) & (peaks["window"] == window)]
    table = pd.DataFrame(
        {
            "corruption": list(rows["corruption"]),
            "tokens": [POSITIONS.get(position, position) for position in rows["position"]],
            "peak layer": list(rows["peak_layer"]),
            "AIE": [Estimate(*each) for each in zip(rows["aie"], rows["se"], ~unfinished(rows), strict=True)],
            "normalised AIE": list(rows["aie_normalised"]),
            "share at peak": list(rows["concentration"]),
        }
    )
    width = "one layer" if window == 1 else f"windows of {window} layers"
    return Table(
        table, f"{_capital(SITES.get(site, site))}, {width}: where each curve peaks, and its AIE ± SE there.", BEST
    )


def _caption(name: str, pictures: pd.DataFrame | None) -> str:
    if name.startswith("aie_"):
        site = name.removeprefix("aie_")
        return AIE.format(site=SITES.get(site, site))
    if name == "noise_scales":
        return NOISE_SCALES
    if name.startswith("fact_"):
        return " ".join([*_prompt(int(name.removeprefix("fact_")), pictures), FACT])
    raise ValueError(f"figures: {name}; captions exist for aie_{{site}}, noise_scales and fact_{{i}}")


def _prompt(number: int, pictures: pd.DataFrame | None) -> list[str]:
    """The prompt and the answer of one picture, if they are known."""
    if pictures is None:
        return []
    rows = traced_rows(pictures, "p_restored", "pictures", PICTURE_COLUMNS)
    facts = sorted(set(rows["fact"]))
    if number >= len(facts):
        raise ValueError(f"figures: fact_{number}; pictures has {len(facts)} facts")
    first = rows[rows["fact"] == facts[number]].iloc[0]
    return [f"“{str(first['prompt']).strip()}” is to be completed by “{str(first['answer']).strip()}”."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
