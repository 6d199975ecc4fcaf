"""Figures and report of effects and interactions, from tables made up for them."""

import numpy as np
import pandas as pd
import pytest

from oacore.config.interactions import Interactions
from oacore.interactions.plots import interaction_figures
from oacore.interactions.report import (
    interaction_methods_section,
    interaction_section,
    interaction_sentence,
    kinds,
    repair_sentence,
    spoofing_sentence,
)
from oacore.report.figures import save
from oacore.report.page import render_page

FIT = {"converged": [True], "steps": [9], "left_nats": [0.0]}


def fabricated(components=("input", "a0.h0", "a1.h1", "m1"), ablations=("optimal", "zero")):
    """Tables of effects, paths and interactions: with two components or more, the first two are redundant, the last two
    cooperate, and zero turns the sign of the first.
    """
    effects, paths, pairs = [], [], []
    for ablation in ablations:
        fit = (True, 9, 0.01) if ablation == "optimal" else (pd.NA, pd.NA, np.nan)
        for n, name in enumerate(components):
            effects.append((name, ablation, 1.0 + n, 0.1, 0.5 * n, 0.1, 0.2, 0.01, n - 1.5, 0.1, 40, *fit))
            paths += [(name, mediator, ablation, 0.1 * n, 0.01, 40, *fit) for mediator in ("layer 1", "m2", "logits")]
        for i, first in enumerate(components):
            for j in range(i + 1, len(components)):
                value = {0: 0.5 if ablation == "optimal" else -0.5, len(components) - 2: -0.3}.get(i, 0.01)
                pairs.append((first, components[j], ablation, value if j == i + 1 else 0.0, 0.02, 40, *fit))
    quantities = [f"{name}{se}_nats" for name in ("total", "direct", "indirect", "self_repair") for se in ("", "_se")]
    return {
        "effects": pd.DataFrame(effects, columns=["component", "method", *quantities, "n_prompts", *FIT]),
        "paths": pd.DataFrame(paths, columns=["component", "mediator", "method", "nats", "se_nats", "n_prompts", *FIT]),
        "interactions": pd.DataFrame(
            pairs, columns=["first", "second", "method", "interaction_nats", "se_nats", "n_prompts", *FIT]
        ),
    }


@pytest.mark.parametrize("components", [("m0",), ("a0.h0", "m0"), tuple(f"a{layer}.h0" for layer in range(12))])
def test_figures_are_those_promised_and_the_same_bytes_again(components, tmp_path):
    tables = fabricated(components)
    figures = interaction_figures(**tables)
    assert list(figures) == list(Interactions(ablations=("optimal", "zero")).figures())
    again = interaction_figures(**tables)
    for name, figure in figures.items():
        first, second = save(figure, tmp_path / name)[0], save(again[name], tmp_path / f"{name}-again")[0]
        assert first.read_bytes() == second.read_bytes()
    svgs = {name: (tmp_path / f"{name}.svg").read_text() for name in figures}
    sections = [interaction_section("ioi", **tables, figures=svgs), interaction_methods_section(["zero", "optimal"])]
    page = render_page("Effects", {}, sections)
    assert page.count("<figure") == len(figures)
    with pytest.raises(ValueError, match="captions exist for"):
        interaction_section("ioi", **tables, figures={"nothing": ""})


def test_what_the_report_says_is_in_the_tables():
    tables = fabricated()
    pairs, effects = tables["interactions"], tables["effects"]
    of_optimal = pairs[pairs["method"] == "optimal"]
    assert kinds(of_optimal).tolist() == ["redundant", *["undecided"] * 4, "cooperating"]
    said = interaction_sentence(pairs, "optimal")
    assert said == (
        "Of 6 pairs under optimal ablation, redundant: 1 (most: input and a0.h0, 0.500 ± 0.020 nats); cooperating: 1 "
        "(most: a1.h1 and m1, −0.300 ± 0.020 nats); by more than two standard errors."
    )
    assert repair_sentence(effects, "optimal").endswith("of a1.h1, 0.50 ± 0.10 nats; m1, 1.50 ± 0.10 nats.")
    assert "1 of these pairs come out as another kind, 1 of them as the opposite one" in spoofing_sentence(
        pairs, "optimal", "zero"
    )
    assert interaction_sentence(pairs.iloc[:0], "optimal") == "There is no pair to compare."


def test_without_standard_errors_no_pair_is_of_a_kind():
    pairs = fabricated()["interactions"].assign(se_nats=np.nan)
    assert set(kinds(pairs)) == {"undecided"}
    assert interaction_figures(**fabricated() | {"interactions": pairs})
