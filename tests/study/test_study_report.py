"""Figures and sentences of a study, from small tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from oacore.config.study import ESTIMATORS, Study
from oacore.fits.convergence import UNFITTED, Convergence
from oacore.report.figures import svg_of
from oacore.report.page import render_page
from oacore.study.exponents import exponents, payoff
from oacore.study.plots import study_figures
from oacore.study.quality import Quality
from oacore.study.report import (
    excess_sentence,
    exponent_sentence,
    payoff_sentence,
    study_methods_section,
    study_sections,
)
from oacore.study.tables import WHOLE, Measured, accuracy_table, cost_table

SIZES = {"small": 10_000, "large": 1_000_000}
FACTS = {
    "small": {"model": "demo-trained", "n_weights": 10_000, "report": "results/s-small/report.html"},
    "large": {"model": "gpt2", "n_weights": 1_000_000, "report": "results/s-large/report.html"},
}
FACTS["small"]["held_out"] = {"ioi_accuracy": 0.75}


def measured(name, budget, n_weights):
    """Seconds grow with the square root of the weights; OA is ahead from 64 passes on, of the small model alone."""
    fitted = ESTIMATORS[name].fitted
    rank = 0.8 if not fitted else 0.9 if n_weights < 1e5 else 0.7
    taken = (name, budget, 20, 100, 40 * fitted, n_weights**0.5, 300.0)
    fit = Convergence(budget is None, 9, 0.01) if fitted else UNFITTED
    return Measured(*taken, Quality(rank, 0.05, 0.25 if budget else 0.0, 0.1), fit)


@pytest.fixture(scope="module")
def tables():
    accuracies, costs, of_circuits = [], [], {"ioi": pd.DataFrame({"method": ["ugs", "eap"]})}
    of_circuits["ioi"] = of_circuits["ioi"].assign(seconds=[30.0, 3.0], peak_mb=500.0, quality=[1, 5.0], quality_se=0.2)
    for name, n_weights in SIZES.items():
        budgets = [(method, budget) for budget in (4, 64) for method in ESTIMATORS]
        asked = [("optimal", None), *((m, b) for m, b in budgets if not (ESTIMATORS[m].fitted and b == 4))]
        of_model = {"model": name, "n_weights": n_weights, "task": "ioi"}
        accuracies.append(accuracy_table(of_model, [measured(m, b, n_weights) for m, b in asked]))
        costs.append(cost_table(accuracies[-1], of_circuits if name == "small" else {}))
    accuracy, cost = (pd.concat(parts, ignore_index=True) for parts in (accuracies, costs))
    columns = ["model", "n_weights", "task", "experiment", "measure", "method", "value", "se"]
    rows = [
        (name, n, "ioi", "ablation", "median_ratio_optimal_to_method", method, share, np.nan)
        for name, n in SIZES.items()
        for method, share in (("optimal", 1.0), ("zero", 0.123))
    ]
    return {
        "cost": cost,
        "accuracy": accuracy,
        "exponents": exponents(cost),
        "payoff": payoff(accuracy),
        "comparison": pd.DataFrame(rows, columns=columns),
    }


def test_cost_has_one_row_for_each_method(tables):
    cost = tables["cost"]
    assert len(cost) == 2 * (len(ESTIMATORS) + 1) + 2
    assert set(cost["method"]) == {*ESTIMATORS, WHOLE, "ugs", "eap"}
    assert (cost["measure"] == "front_ratio_to_ugs").sum() == 2 == cost["forward_passes"].isna().sum()


def test_sentences_say_what_the_tables_say(tables):
    assert "seconds: optimal_converged 0.5" in exponent_sentence(tables["exponents"])
    said = payoff_sentence(tables["payoff"])
    assert "than zero: small 64, large never" in said and "than attribution: small 64, large never" in said
    assert excess_sentence(tables["accuracy"]).endswith("64 passes 25.0\u00a0%.")
    nothing = tables["accuracy"][tables["accuracy"]["method"] == "zero"]
    assert excess_sentence(nothing) == "" and payoff_sentence(payoff(nothing)) == ""


def test_the_page_has_every_figure_and_links_to_the_members(tables):
    drawn = study_figures(*(tables[name] for name in ("cost", "accuracy", "exponents", "payoff")))
    assert tuple(drawn) == Study.figures(("ioi",))
    figures = {name: svg_of(figure) for name, figure in drawn.items()}
    sections = study_sections(FACTS, tables, figures, Path("results/s/report.html"))
    page = render_page("Study", {}, sections, [study_methods_section(tuple(ESTIMATORS))])
    assert '<a href="../s-small/report.html">small: demo-trained, 10,000 weights</a>' in page
    assert page.count("<figure") == 3 and "ioi_accuracy" in page.replace("<wbr>", "")
    assert page.count("0.123") == 2, "a column for each member"
