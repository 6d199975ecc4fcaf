"""What reports say of fits that the cap on steps ended."""

import numpy as np
import pandas as pd

from oacore.report.cells import cell_rows
from oacore.report.convergence import convergence_sentence, unfinished
from oacore.report.numbers import Estimate, human
from oacore.report.parts import Table


def table(converged, value=2.0, left=0.1):
    frame = pd.DataFrame({"kl": value, "converged": converged, "left": left}, index=range(len(converged)))
    return frame.astype({"converged": "boolean"})


def test_the_sentence_counts_the_unfinished_and_says_what_is_left():
    some = table([True, False, False, None], left=[0.0, 0.02, 0.1, np.nan])
    text = convergence_sentence(some, "kl", "left", "lower their KL")
    assert text.startswith("† The cap on steps ended 2 of 3 fits before they had converged")
    assert "lower their KL by about 3.00\u00a0% (the median; at most 5.00\u00a0%)" in text
    assert "move it by about 0.0600 (the median; at most 0.100)" in convergence_sentence(some, "", "left", "move it")
    assert convergence_sentence(table([True, None]), "kl", "left", "lower") == "All 1 fits converged."
    assert convergence_sentence(table([None, None]), "kl", "left", "lower") == ""
    assert convergence_sentence(pd.DataFrame({"kl": [1.0]}), "kl", "left", "lower") == "", "a table without fits"


def test_unfinished_rows_survive_a_csv_file(tmp_path):
    some = table([True, False, None])
    some.to_csv(tmp_path / "t.csv", index=False)
    assert unfinished(some).tolist() == unfinished(pd.read_csv(tmp_path / "t.csv")).tolist() == [False, True, False]


def test_a_number_whose_fit_is_unfinished_carries_a_dagger():
    assert human(Estimate(0.5, 0.01, finished=False)) == "0.500 ± 0.010 †" and "†" not in human(Estimate(0.5, 0.01))
    frame = pd.DataFrame(
        {"kl": [Estimate(0.5, 0.01, finished=False), Estimate(0.5, 0.01), Estimate(0.5, np.nan, False)]}
    )
    cells = [row[0] for row in cell_rows(Table(frame, ""))]
    assert [(cell.text, cell.error) for cell in cells] == [("0.500", "0.010†"), ("0.500", "0.010"), ("0.500†", "")]
