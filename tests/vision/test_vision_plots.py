"""Figures and sentences of a network's units, from small tables."""

import numpy as np
import pandas as pd
import pytest

from oacore.config.vision import MEASURES, Vision
from oacore.report.figures import svg_of
from oacore.report.page import render_page
from oacore.vision.plots import vision_figures
from oacore.vision.report import (
    agreement_sentence,
    budget_sentence,
    sanity_sentence,
    size_sentence,
    vision_methods_section,
    vision_section,
)
from oacore.vision.tables import AGREEMENT, CURVES, SANITY

SETTINGS = Vision(
    units=("channels", "blocks"), replacements=("optimal", "zero"), network={"widths": (5, 5), "branches": 1}, layer=1
)
FACTS = {
    "n_weights": 10,
    "n_images": {"test": 4},
    "accuracy": {"test": 0.9},
    "loss_nats": {"test": 0.1},
    "model_hash": "0" * 64,
}


@pytest.fixture(scope="module")
def tables():
    rows = []
    for kind, n in (("channels", 5), ("blocks", 2)):
        for number, name in enumerate(SETTINGS.measures()):
            fitted = (False, 9, 0.002) if "optimal" in name else (None, None, np.nan)
            rows += [
                (kind, f"{kind[:-1]} {i}", "here", name, 0.1 * i + 0.01 * number - 0.005, 0.01, 4, 100, *fitted)
                for i in range(n)
            ]
    columns = ["units", "unit", "layer", "method", "importance_nats", "se_nats", "n_images", "forward_passes"]
    importance = pd.DataFrame(rows, columns=[*columns, "converged", "steps", "left_nats"])
    rows = [
        ("channels", name, "shapley_optimal", budget, budget or 900, 0.5 + 0.1 * place, 0.4, 0.9, 0.95, 2)
        for place, name in enumerate(SETTINGS.measures())
        for budget in (100, None)
        if not (name == "shapley_optimal" and budget is None)
    ]
    agreement = pd.DataFrame(rows, columns=list(AGREEMENT)).astype({"budget": "Int64"})
    rows = [
        ("channels", name, replacement, direction, k, 0.2 * k, 0.01, 0.3, 0.02)
        for name in SETTINGS.measures()
        for replacement in ("optimal", "zero")
        for direction in ("deletion", "insertion")
        for k in range(6)
    ]
    sanity = pd.DataFrame(
        [("channels", "zero", "all", 0.25), ("channels", "optimal", "head", 0.5)], columns=list(SANITY)
    )
    return importance, agreement, pd.DataFrame(rows, columns=list(CURVES)), sanity


def test_figures_are_those_of_the_settings(tables):
    figures = vision_figures(*tables[:3], "shapley_optimal")
    assert tuple(figures) == ("importance_channels", "importance_blocks", "agreement_channels", "curves_channels")
    assert set(figures) == set(SETTINGS.figures())
    assert all(
        svg_of(figure) == svg_of(vision_figures(*tables[:3], "shapley_optimal")[name])
        for name, figure in figures.items()
    )
    panels = figures["importance_channels"].axes
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == [f"channel {i}" for i in (4, 3, 2, 1, 0)]


def test_the_section_says_what_the_tables_say(tables):
    importance, agreement, curves, sanity = tables
    assert size_sentence(importance, "blocks").startswith("Replaced one by one, blocks cost in sum")
    assert "zero 0.0900 of 0.130" in size_sentence(importance, "blocks")
    said = agreement_sentence(agreement, "channels", "shapley_optimal")
    assert said.index("conductance 1.00") < said.index("zero 0.500") and "shapley_zero" not in said
    assert budget_sentence(agreement, "channels", "shapley_optimal").endswith("with 100 passes, conductance (1.00).")
    assert "0.250 over channels (zero)" in sanity_sentence(sanity) and sanity_sentence(sanity.iloc[1:]) == ""
    figures = {name: svg_of(figure) for name, figure in vision_figures(*tables[:3], "shapley_optimal").items()}
    section = vision_section(importance, agreement, curves, sanity, figures, FACTS, "shapley_optimal")
    # 5 channels and 2 blocks alone; one fit for sets of either.
    assert "ended 9 of 9 fits" in section.intro
    page = render_page("A page", {}, [section], [vision_methods_section(list(MEASURES))])
    assert page.count("<figure") == 4 and "Layer conductance" in page
