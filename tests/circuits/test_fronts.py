"""Fronts of circuits, and areas between them, on fabricated tables whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oacore.circuits.fronts import best_within, compare_fronts, front, front_sizes, front_table, smallest_good

COLUMNS = ["method", "ablation", "objective", "knob", "seed", "edges", "nodes", "kl_nats", "se_nats"]
COLUMNS += ["validation_kl_nats", "logit_diff"]
WORSE = {"ugs": 1.0, "hcgs": 1.4, "eap": 4.0, "acdc": 2.0, "random": 30.0}  # times the loss of UGS at the same size


def circuits(rows):
    """A table from (method, ablation, edges, kl, se), of equal loss on validation and on test prompts."""
    full = [(m, a, "kl", 0.001 * i, 0, e, e // 3 + 1, kl, se, kl, 1.5) for i, (m, a, e, kl, se) in enumerate(rows)]
    return pd.DataFrame(full, columns=COLUMNS).assign(fit_seconds=1.0, peak_mb=10.0)


def fabricate(methods=tuple(WORSE), ablations=("counterfactual", "optimal")):
    sizes = (10, 20, 50, 90, 200, 400)
    harm = dict.fromkeys(ablations, 8.0) | {"optimal": 1.0}
    rows = [
        (m, a, e, WORSE.get(m, 3.0) * harm[a] / e, 0.02 * WORSE.get(m, 3.0) * harm[a] / e)
        for m in methods
        for a in ablations
        for e in sizes
    ]
    return circuits(rows)


def compared(table, noise=0.02, n=40):
    """All comparisons, of losses on n prompts that scatter about each circuit's KL."""
    scatter = np.random.default_rng(0).normal(0, noise, (len(table), n))
    scatter -= scatter.mean(1, keepdims=True)
    return compare_fronts(table, table["kl_nats"].to_numpy()[:, None] * (1 + scatter), np.arange(n))


# ---- Fronts ----------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 6).map(lambda kl: kl / 4)), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(POINTS, st.integers(-1, 7))
def test_front_is_what_no_other_circuit_dominates(points, size):
    table = circuits([("ugs", "optimal", edges, kl, 0.1) for edges, kl in points])
    best = front(table)
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    found = list(zip(best["edges"], best["kl_nats"], strict=True))
    assert set(found) == undominated and len(found) == len(undominated)
    assert found == sorted(found)
    small = [kl for edges, kl in points if edges <= size]
    row = best_within(table, size)
    assert (row is None) == (not small)
    if small:
        assert row["kl_nats"] == min(small) and row["edges"] == min(edges for edges, kl in points if kl == min(small))
    shuffled = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(front(shuffled), best)


def test_front_leaves_out_what_was_not_measured():
    table = circuits([("ugs", "optimal", 5, np.nan, 0.1), ("ugs", "optimal", 9, 0.5, 0.1)])
    assert front(table)["edges"].tolist() == [9]
    assert best_within(table, 5) is None


def test_front_table_has_the_best_of_each_size_and_its_ratio():
    table = front_table(fabricate(("ugs", "hcgs", "eap")), [20, 100])
    assert table["ablation"].drop_duplicates().tolist() == ["counterfactual", "optimal"]
    rows = table[(table["ablation"] == "optimal") & (table["max_edges"] == 100)].set_index("method")
    assert rows["edges"].tolist() == [90, 90, 90]
    np.testing.assert_allclose(rows["kl_nats"], [1 / 90, 1.4 / 90, 4 / 90])
    np.testing.assert_allclose(rows["ratio_to_best"], [1, 1.4, 4])


@pytest.mark.parametrize("kl", [0.0, 1e-8])
def test_front_table_without_a_small_circuit_or_a_best_above_the_floor(kl):
    table = front_table(circuits([("ugs", "optimal", 5, kl, 0.1), ("eap", "optimal", 40, 0.5, 0.1)]), [4, 10, 40])
    assert list(zip(table["max_edges"], table["method"], strict=True)) == [(10, "ugs"), (40, "ugs"), (40, "eap")]
    assert table["ratio_to_best"].isna().all()


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(40, 0.30), (60, 0.19), (90, 0.11), (300, 0.10)], 60),  # within twice the lowest
        ([(40, 0.30), (90, 2e-8), (479, 0.0)], 90),  # below the floor, losses are alike
        ([(40, 0.30), (470, -1.45e-8), (479, -1.4e-8)], 470),  # as a table of an older version may have them
        ([(1200, 0.1), (1100, 0.2)], 1100),  # all too large to draw
        ([(60, 0.2), (60, 0.1), (1100, 0.0)], 60),
    ],
)
def test_the_circuit_that_is_drawn(points, chosen):
    row = smallest_good(circuits([("ugs", "optimal", edges, kl, 0.1) for edges, kl in points]), 1000)
    assert row["edges"] == chosen and row["kl_nats"] == min(kl for edges, kl in points if edges == chosen)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40_000), min_size=1, max_size=8), st.lists(st.integers(0, 40_000), min_size=1, max_size=8)
)
def test_sizes_of_the_table_are_reached_and_few(first, second):
    rows = [(m, "optimal", e, 1 / (1 + e), 0.1) for m, sizes in (("ugs", first), ("eap", second)) for e in sizes]
    sizes = front_sizes(circuits(rows))
    assert 1 <= len(sizes) <= 5 and sizes == sorted(set(sizes))
    assert max(min(first), min(second)) <= sizes[0] and sizes[-1] <= max(1, *first, *second)


# ---- Areas -----------------------------------------------------------------------------------------------------------


def power_laws(grids, laws, ablation="optimal"):
    """Fronts a * edges^-b of each method on a grid of its own."""
    rows = [
        (m, ablation, e, a * e**-b, 0.01) for (m, grid), (a, b) in zip(grids.items(), laws, strict=True) for e in grid
    ]
    return circuits(rows)


def pair(rows, method="ugs", other="acdc"):
    return rows[(rows["method"] == method) & (rows["other"] == other)].iloc[0]


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.integers(1, 400), min_size=2, max_size=7),
    st.sets(st.integers(1, 400), min_size=2, max_size=7),
    st.tuples(st.floats(0.1, 4), st.floats(0.1, 2)),
    st.tuples(st.floats(0.1, 4), st.floats(0.1, 2)),
)
def test_the_area_between_power_laws_is_exact_on_any_grids(own, other, first, second):
    """log KL is linear in log edges, so that a hole in a grid must change nothing; the mean of a line is its middle."""
    table = power_laws({"ugs": sorted(own), "acdc": sorted(other)}, (first, second))
    low, high = max(min(own), min(other)), min(max(own), max(other))
    row = pair(compared(table))
    if low > high:
        assert row["verdict"] == "apart" and np.isnan(row["ratio"])
        return
    middle = (np.log(low) + np.log(high)) / 2
    expected = np.log(first[0] / second[0]) - (first[1] - second[1]) * middle
    assert np.log(row["ratio"]) == pytest.approx(expected, abs=1e-6)
    assert (row["edges_low"], row["edges_high"]) == (low, high)
    back = pair(compared(table), "acdc", "ugs")
    assert back["ratio"] * row["ratio"] == pytest.approx(1)


def test_a_dominated_circuit_changes_nothing():
    grids = {"ugs": (10, 40, 160), "acdc": (10, 80, 200)}
    plain = power_laws(grids, ((1, 1), (2, 1)))
    worse = pd.concat([plain, circuits([("ugs", "optimal", 100, 3.0, 0.01)])], ignore_index=True)
    assert pair(compared(worse))["ratio"] == pytest.approx(pair(compared(plain))["ratio"])


def test_circuits_are_chosen_on_validation_and_reported_on_test():
    """Of ten equal circuits one is lucky on the test prompts: the front must not know."""
    table = circuits([("ugs", "optimal", 50, 1.0, 0.1)] * 10 + [("acdc", "optimal", 50, 1.0, 0.1)])
    table.loc[3, "kl_nats"] = 0.2  # lucky on test
    table.loc[6, ["kl_nats", "validation_kl_nats"]] = 1.1, 0.9  # chosen
    assert best_within(table[table["method"] == "ugs"], 50)["kl_nats"] == 1.1
    assert pair(compared(table))["ratio"] == pytest.approx(1.1)
    assert front_table(table, [50]).set_index("method")["kl_nats"]["ugs"] == 1.1
    assert smallest_good(table[table["method"] == "ugs"], 1000)["kl_nats"] != 0.2


def test_the_interval_covers_the_truth_and_knows_of_clusters():
    """Losses of 30 subjects with 8 prompts each, which share most of their luck; the truth is a ratio of 0.8. As if
    prompts were independent, intervals would be 2.6 times too narrow and cover it about half of the time.
    """
    table, covered, narrow = power_laws({"ugs": (10, 100), "acdc": (10, 100)}, ((0.8, 1), (1, 1))), [], []
    clusters = np.repeat(np.arange(30), 8)
    for draw in range(60):
        generator = np.random.default_rng(draw)
        luck = generator.normal(0, 0.3, (4, 30))[:, clusters] + generator.normal(0, 0.1, (4, 240))
        losses = table["kl_nats"].to_numpy()[:, None] * np.exp(luck - 0.05)
        for numbers, results in ((clusters, covered), (np.arange(240), narrow)):
            row = pair(compare_fronts(table, losses, numbers, n_resamples=300))
            results.append(row["low"] <= 0.8 <= row["high"])
    assert np.mean(covered) >= 0.85 > 0.75 > np.mean(narrow)


def test_verdicts_are_those_of_the_interval():
    table = power_laws({"ugs": (10, 100), "acdc": (10, 100), "hcgs": (10, 100)}, ((0.9, 1), (1, 1), (0.9005, 1)))
    rows = compared(table, noise=0.05)
    assert pair(rows)["verdict"] == "below" and pair(rows, "acdc", "ugs")["verdict"] == "above"
    assert pair(rows, "ugs", "hcgs")["verdict"] == "undecided"
    row = pair(rows)
    assert row["low"] < row["ratio"] < row["high"] < 1


def test_it_says_where_the_difference_is_largest():
    table = circuits([("ugs", "optimal", e, kl, 0.01) for e, kl in ((10, 1.0), (40, 0.8), (160, 0.1))])
    table = pd.concat(
        [table, circuits([("acdc", "optimal", e, 1.0 / e, 0.01) for e in (10, 40, 160)])], ignore_index=True
    )
    row = pair(compared(table))
    assert row["at_edges"] == 40 and row["largest_ratio"] == pytest.approx(0.8 * 40)


def test_more_seeds_are_no_advantage_and_widen_the_interval():
    """Three seeds of ugs, of very unequal luck: their mean counts, not the best of them."""
    seeds = []
    for seed, factor in enumerate((0.5, 1.0, 2.0)):
        part = power_laws({"ugs": (10, 100), "acdc": (10, 100)}, ((factor, 1), (1, 1)))
        seeds.append(part.assign(seed=seed))
    row = pair(compared(pd.concat(seeds, ignore_index=True)))
    assert row["n_seeds"] == 3 and row["ratio"] == pytest.approx(1.0)
    assert row["low"] < 0.7 and row["high"] > 1.4 and row["verdict"] == "undecided"


def test_losses_of_zero_and_circuits_without_edges():
    rows = [("ugs", "optimal", 0, 3.0, 0.1), ("ugs", "optimal", 10, 0.0, 0.0), ("acdc", "optimal", 10, 0.0, 0.0)]
    row = pair(compared(circuits(rows)))
    assert row["ratio"] == 1 and row["verdict"] == "undecided"
    only_empty = circuits([("ugs", "optimal", 0, 3.0, 0.1), ("acdc", "optimal", 10, 1.0, 0.1)])
    assert pair(compared(only_empty))["verdict"] == "apart"


def test_a_single_method_has_a_table_without_rows(tmp_path):
    """Which must be read back: an empty file without a header can't."""
    compared(fabricate(("ugs",))).to_csv(tmp_path / "fronts.csv", index=False)
    assert list(pd.read_csv(tmp_path / "fronts.csv").columns)[:3] == ["ablation", "method", "other"]


def test_the_same_seed_gives_the_same_intervals():
    table = fabricate(("ugs", "acdc"))
    pd.testing.assert_frame_equal(compared(table), compared(table))
