"""What figures and sentences say of a table whose answers are plain to see."""

import numpy as np
import pandas as pd
import pytest

from oacore.config.removal import Removal
from oacore.removal.plots import TYPES, removal_figures
from oacore.removal.report import chosen, cost_sentence, held_out_sentence, relearning_sentence, removal_section
from oacore.report.figures import svg_of

COLUMNS = (
    "method", "ablation", "knob", "seed", "ablations", "forget_accuracy", "paraphrase_accuracy", "retain_kl_nats",
    "held_out_kl_nats", "relearn_steps", "relearned", "relearn_accuracy", "validation_loss_nats", "converged",
)  # fmt: skip
ROWS = (
    ("ugs", "optimal", 0.1, 0, 1, 0.6, 0.7, 0.01, 0.02, None, None, np.nan, 0.5, True),
    ("ugs", "optimal", 0.01, 0, 4, 0.2, 0.3, 0.1, 0.2, None, None, np.nan, 0.3, True),
    ("gap", "optimal", 1, 0, 1, 0.4, 0.4, 2.0, 3.0, 2, True, 0.95, 2.5, False),
    ("random", "optimal", 1, 0, 1, 0.9, 0.9, 0.001, 0.001, 8, False, 0.92, 0.9, True),
    ("ugs", "zero", 0.1, 0, 0, 1.0, 1.0, 0.0, 0.0, None, None, np.nan, 1.0, None),
)
SETTINGS = {
    "forget": "facts", "retain": "ioi", "paraphrases": "facts", "methods": ["ugs", "gap", "random"],
}  # fmt: skip


@pytest.fixture
def front():
    table = pd.DataFrame(ROWS, columns=COLUMNS).assign(accuracy_before=1.0, steps=8, left_nats=0.1)
    errors = {f"{name}_se": 0.01 for name in ("forget", "paraphrase", "retain", "held_out")}
    return table.assign(**errors).astype(TYPES)


def test_each_method_s_ablation_is_chosen_on_validation_prompts(front):
    best = chosen(front)
    assert best["knob"].tolist() == [0.01, 1, 1, 0.1]


def test_sentences(front):
    best = chosen(front)
    said = cost_sentence(best, "optimal")
    assert "ugs costs least: with 4 edges the accuracy is 0.200 ± 0.010 at a retained KL of 0.100 ± 0.010 nats" in said
    assert said.endswith("of the methods that halve the accuracy; random does not.")
    assert cost_sentence(best, "zero") == "Under zero ablation no method halves that."
    # The median of ugs and gap.
    assert "0.350 (forgotten prompts: 0.300)" in held_out_sentence(best)
    assert "1.60 nats (retained ones: 1.05)" in held_out_sentence(best)
    assert relearning_sentence(best) == (
        "Of the 1 of these that can be fine-tuned it brings the behaviour back in 1, in the median after 2 steps."
    )


def test_figures_are_those_that_the_settings_promise(front):
    figures = removal_figures(front)
    assert tuple(figures) == Removal.model_validate(SETTINGS).figures()
    section = removal_section("facts", front, {name: svg_of(figure) for name, figure in figures.items()})
    assert len(section.parts) == len(figures) + 1
    table = section.parts[-1].frame
    assert table["ablated"].tolist() == ["4 edges", "1 component", "1 component", "0 edges"]
    assert table["steps to relearn"].tolist()[1:3] == ["2", "> 8"]
    assert all(value is None or pd.isna(value) for value in table["steps to relearn"].tolist()[::3])
    with pytest.raises(ValueError, match="captions exist for"):
        removal_section("facts", front, {"other": ""})


def test_without_paraphrases_and_relearning_there_are_no_figures_of_them(front):
    nothing = {"paraphrase_accuracy": np.nan, "held_out_kl_nats": np.nan, "relearn_steps": None}
    bare = front.assign(**nothing).astype(TYPES)
    settings = Removal.model_validate({"forget": "facts", "retain": "ioi", "relearn": {"max_steps": 0}})
    assert tuple(removal_figures(bare)) == settings.figures()
    assert held_out_sentence(chosen(bare)) == relearning_sentence(chosen(bare)) == ""
