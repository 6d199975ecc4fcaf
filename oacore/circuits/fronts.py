"""Fronts of circuits: which a method is judged by, and how those of two methods compare over all sizes that both reach.

A front holds the circuits that no smaller or equal one of the same method beats *on validation prompts*; what is
reported of them is measured on test prompts, so that no circuit is chosen by the luck that it is then praised for.

Two fronts are compared by the area between them in log KL over log edges, as a mean per unit of log size: the geometric
mean of the ratio of their KLs. Between its circuits a front is interpolated linearly in both logarithms, and not taken
as the staircase of what was found: sizes that a method's grid of knobs leaves out would read as losses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from oacore.config.circuits import CIRCUIT_METHODS, EDGE_ABLATIONS
from oacore.report.numbers import FLOOR
from oacore.report.series import in_order

COLUMNS = (
    *("method", "ablation", "objective", "knob", "seed", "edges", "nodes"),
    *("kl_nats", "se_nats", "validation_kl_nats", "logit_diff"),
)
COMPARED = (
    *("ablation", "method", "other", "edges_low", "edges_high", "ratio", "low", "high"),
    *("verdict", "largest_ratio", "at_edges", "n_seeds"),
)
N_RESAMPLES = 2000


def with_loss(pareto: pd.DataFrame) -> pd.DataFrame:
    """The circuits with a KL, those found with another objective than KL under a name of their own: `ugs (logit_diff)`.

    Raises ValueError if a column is missing, if no circuit has a KL or if one is infinite.
    """
    if missing := [column for column in COLUMNS if column not in pareto]:
        raise ValueError(f"pareto: no column {', '.join(missing)}; found {', '.join(map(str, pareto.columns))}")
    pareto = pareto[pareto["kl_nats"].notna()].reset_index(drop=True)
    if pareto.empty:
        raise ValueError("pareto: no row with a value in kl_nats")
    if (infinite := np.isinf(pareto["kl_nats"])).any():
        raise ValueError(f"pareto: infinite kl_nats for a circuit of {pareto[infinite]['method'].iloc[0]}")
    plain = pareto["objective"].isna() | (pareto["objective"] == "kl")
    method = pareto["method"].map(base_name)  # so that doing this twice changes nothing
    return pareto.assign(method=method.where(plain, method + " (" + pareto["objective"].astype(str) + ")"))


def base_name(method: str) -> str:
    """The method without its objective."""
    return method.partition(" (")[0]


def methods_in_order(pareto: pd.DataFrame) -> list[str]:
    """The methods present, in the order of the registry, each followed by its other objectives; unknown ones last."""
    names, order = sorted(set(pareto["method"])), list(CIRCUIT_METHODS)
    return sorted(names, key=lambda name: order.index(base_name(name)) if base_name(name) in order else len(order))


def front(circuits: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row dominates on validation prompts, by edges: their validation KL falls strictly. Of
    equal circuits, the one of the lowest knob and seed.
    """
    ties = [column for column in ("method", "knob", "seed") if column in circuits]
    ordered = circuits[circuits["kl_nats"].notna()].sort_values(["edges", "validation_kl_nats", *ties], kind="stable")
    before = ordered["validation_kl_nats"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["validation_kl_nats"] < before]


def smallest_good(circuits: pd.DataFrame, most: int) -> pd.Series:
    """The row to draw: of circuits with at most `most` edges the smallest one whose validation KL is at most twice the
    lowest, or at most `FLOOR`.

    If all have more edges, one of the smallest.
    """
    few = circuits[circuits["edges"] <= most]
    few = few if len(few) else circuits[circuits["edges"] == circuits["edges"].min()]
    good = few[few["validation_kl_nats"] <= max(2 * few["validation_kl_nats"].min(), FLOOR)]
    return good.sort_values(["edges", "validation_kl_nats"], kind="stable").iloc[0]


def best_within(circuits: pd.DataFrame, edges: float) -> pd.Series | None:
    """The row of the lowest validation KL among circuits with at most `edges` edges; None if there is none."""
    small = front(circuits[circuits["edges"] <= edges])
    return None if small.empty else small.iloc[-1]


def front_sizes(pareto: pd.DataFrame, most: int = 5) -> list[int]:
    """Sizes to show fronts at: of 1, 2, 5, 10, 20, ... edges those that at least two methods reach, `most` of them."""
    smallest = np.sort(pareto.groupby("method")["edges"].min())
    largest = max(1, *(int(front(circuits)["edges"].max()) for _, circuits in pareto.groupby("method")))
    low = smallest[min(1, len(smallest) - 1)]
    sizes = [
        step * 10**power
        for power in range(len(str(largest)))
        for step in (1, 2, 5)
        if low <= step * 10**power <= largest
    ]
    sizes = sizes or [largest]
    chosen = np.unique(np.linspace(0, len(sizes) - 1, min(most, len(sizes))).round().astype(int))
    return [sizes[i] for i in chosen]


def front_table(pareto: pd.DataFrame, sizes: Sequence[int] | None = None) -> pd.DataFrame:
    """Each method's best circuit within each size, one row per ablation type, size and method: ablation, max_edges,
    ratio_to_best, and the circuit's columns. A method without so small a circuit has no row; `ratio_to_best` is NaN if
    the best KL is at or below `FLOOR`.

    `sizes`: the largest numbers of edges allowed; by default `front_sizes` of each ablation type.
    """
    pareto = with_loss(pareto)
    rows = []
    for ablation in in_order(pareto["ablation"], EDGE_ABLATIONS):
        circuits = pareto[pareto["ablation"] == ablation]
        for size in sizes or front_sizes(circuits):
            within = (best_within(circuits[circuits["method"] == name], size) for name in methods_in_order(circuits))
            present = [row for row in within if row is not None]
            best = min((row["kl_nats"] for row in present), default=np.nan)
            for row in present:
                ratio = row["kl_nats"] / best if best > FLOOR else np.nan
                rows.append(row.to_dict() | {"max_edges": size, "ratio_to_best": ratio})
    return pd.DataFrame(rows)


class _Curve(NamedTuple):
    """A front between its circuits: log KL over log edges."""

    log_edges: np.ndarray  # [n] rising
    circuits: np.ndarray  # [n] rows of the table

    def weights(self, at: np.ndarray) -> np.ndarray:
        """[len(at), n]: what each circuit's log KL counts at each log size."""
        return np.stack([np.interp(at, self.log_edges, row) for row in np.eye(len(self.circuits))], 1)


def _curve(circuits: pd.DataFrame) -> _Curve | None:
    """None if no circuit has an edge, which a log size has no place for."""
    points = front(circuits[circuits["edges"] > 0])
    return _Curve(np.log(points["edges"].to_numpy(float)), points.index.to_numpy()) if len(points) else None


class _Between(NamedTuple):
    """The area between two fronts of one seed as a linear function of the log KLs of all circuits."""

    low: float  # ends of the common range of log edges
    high: float
    at: np.ndarray  # [g] where either front bends
    differences: np.ndarray  # [g, C] of log KL there
    mean: np.ndarray  # [C] per unit of log size


def _between(own: _Curve | None, other: _Curve | None, n_circuits: int) -> _Between | None:
    """None if no size is common to both."""
    if own is None or other is None:
        return None
    low = max(own.log_edges[0], other.log_edges[0])
    high = min(own.log_edges[-1], other.log_edges[-1])
    if low > high:
        return None
    bends = np.concatenate((own.log_edges, other.log_edges))
    at = np.unique(np.concatenate(([low, high], bends[(bends >= low) & (bends <= high)])))
    differences = np.zeros((len(at), n_circuits))
    differences[:, own.circuits] += own.weights(at)
    differences[:, other.circuits] -= other.weights(at)
    mean = differences[0] if len(at) == 1 else np.trapezoid(differences, at, axis=0) / (high - low)
    return _Between(low, high, at, differences, mean)


def compare_fronts(
    pareto: pd.DataFrame,
    losses: np.ndarray,
    clusters: np.ndarray,
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> pd.DataFrame:
    """The front of every method against every other's, under the same ablation type.

    Columns: ablation, method, other; edges_low, edges_high of the range that both cover; ratio, the geometric mean over
    log size of KL(method) / KL(other), with its 95 % interval low, high; verdict: `below` or `above` if that excludes
    1, else `undecided`, and `apart` without a common size; largest_ratio, and at_edges, where they differ most to the
    disadvantage of `method`; n_seeds.

    Fronts are those of each seed, and their areas are averaged, so that no method gains by having more tries. The
    interval is a percentile bootstrap over clusters of prompts, the same for both methods, and over seeds where there
    are several; the circuits on the fronts are fixed, as they were chosen on other prompts.

    Args:
        losses: [C, N] test KL in nats of each row of `pareto` on each prompt.
        clusters: [N] prompts of the same number may depend on each other.
    """
    table = with_loss(pareto.assign(row=np.arange(len(pareto)))).set_index("row", drop=False)
    drawn, generator = _resampled_log_means(losses, clusters, seed, n_resamples), np.random.default_rng([seed, 1])
    rows = []
    for ablation in in_order(table["ablation"], EDGE_ABLATIONS):
        circuits = table[table["ablation"] == ablation]
        names = methods_in_order(circuits)
        for method in names:
            for other in (name for name in names if name != method):
                of_seeds = [
                    _between(
                        _curve(group[group["method"] == method]), _curve(group[group["method"] == other]), len(losses)
                    )
                    for _, group in circuits.groupby("seed")
                ]
                found = [between for between in of_seeds if between is not None]
                pair = {"ablation": ablation, "method": method, "other": other}
                rows.append(pair | _compared(found, drawn, generator))
    return pd.DataFrame(rows, columns=list(COMPARED))


def _resampled_log_means(losses: np.ndarray, clusters: np.ndarray, seed: int, n_resamples: int) -> np.ndarray:
    """Log mean KL of each circuit [1 + n_resamples, C]: as measured, then over clusters drawn with replacement."""
    number = np.unique(clusters, return_inverse=True)[1]
    members = np.eye(int(number.max()) + 1)[number]  # [N, G]
    counts = members.sum(0)
    drawn = np.random.default_rng([seed, 0]).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), n_resamples
    )
    weights = np.concatenate((np.ones((1, len(counts))), drawn))
    means = (weights @ (losses.astype(np.float64) @ members).T) / (weights @ counts)[:, None]
    return np.log(np.maximum(means, FLOOR))


def _compared(found: Sequence[_Between], drawn: np.ndarray, generator: np.random.Generator) -> dict[str, object]:
    if not found:
        nothing: dict[str, object] = dict.fromkeys(("edges_low", "edges_high", "ratio", "low", "high"), np.nan)
        return nothing | {"verdict": "apart", "largest_ratio": np.nan, "at_edges": np.nan, "n_seeds": 0}
    n_seeds = len(found)
    areas = drawn @ np.stack([between.mean for between in found]).T  # [1 + n_resamples, seeds]
    picked = generator.integers(n_seeds, size=(len(areas) - 1, n_seeds))
    low, high = np.quantile(np.take_along_axis(areas[1:], picked, 1).mean(1), (0.025, 0.975))
    worst = max(found, key=lambda between: float((between.differences @ drawn[0]).max()))
    differences = worst.differences @ drawn[0]
    return {
        "edges_low": int(np.rint(np.exp(min(between.low for between in found)))),
        "edges_high": int(np.rint(np.exp(max(between.high for between in found)))),
        "ratio": float(np.exp(areas[0].mean())),
        "low": float(np.exp(low)),
        "high": float(np.exp(high)),
        "verdict": "below" if high < 0 else "above" if low > 0 else "undecided",
        "largest_ratio": float(np.exp(differences.max())),
        "at_edges": int(np.rint(np.exp(worst.at[differences.argmax()]))),
        "n_seeds": n_seeds,
    }
