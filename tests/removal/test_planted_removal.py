"""Removal against the truth: a planted model that says four words again along one path, four others along another."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted.effects import ANSWER, MESSAGE, ONE_OF_EACH, WORD, WORDS, linear, planted

from oacore.circuits.edges import Edges
from oacore.circuits.search import Knob
from oacore.config.read import parse_config
from oacore.config.removal import REMOVAL_METHODS
from oacore.engine.masked import Engine
from oacore.errors import UserError
from oacore.removal.behaviours import behaviours
from oacore.removal.learned import START, ComponentSampler, EdgeSampler
from oacore.removal.measure import front, measured
from oacore.removal.relearn import relearn
from oacore.removal.request import RemovalRequest
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import SPLITS, Prompts

FIRST, SECOND = (torch.diag((torch.arange(WORDS) < WORDS // 2).float() if first else
                            (torch.arange(WORDS) >= WORDS // 2).float()) for first in (True, False))  # fmt: skip
PATH = {"input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits"}
ON_PATH = {"a0.h0", "a1.h0"}
SECTION = {
    "forget": {"facts": "first"},
    "retain": {"facts": "second"},
    "paraphrases": {"facts": "first"},
    "held_out": {"facts": "second"},
    "edge_prices": [0.05],
    "component_prices": [0.05],
    "sizes": [1],
    "ranks": [3],
    "weight": 1,
    "n_prompts": 4,
    "masks": {"n_steps": 150, "n_samples": 4, "n_prompts": 8, "learning_rate": 3, "constants_rate": 0.05},
    "refit": {"batch_size": 8, "first_round": 20, "max_steps": 60},
    "relearn": {"n_prompts": 4, "learning_rate": 0.1, "max_steps": 16},
}

NOTHING = torch.empty(0)  # these samplers have no schedule


def prompts(split):
    words = np.arange(1, WORDS + 1, dtype=np.int32)
    tokens = np.stack((np.zeros(WORDS, np.int32), words), 1)
    none = np.full((WORDS, 1), -1, np.int32)
    text = [f"{'first' if word <= WORDS // 2 else 'second'} {word}" for word in words]
    return Prompts(
        "facts", split, text, tokens, np.full(WORDS, 2, np.int32), tokens, words[:, None], none,
        np.full((WORDS, 2), -1, np.int32), words[:, None], words,
    )  # fmt: skip


def opened(**changed):
    config = parse_config({"tasks": {"facts": None}, "device": "cpu", "removal": SECTION | changed})
    # The first words go through a message, the second are said at once.
    heads = {
        "a0.h0": linear((WORD, FIRST, MESSAGE)),
        "a1.h0": linear((MESSAGE, 8 * ONE_OF_EACH, ANSWER)),
        "a0.h1": linear((WORD, 8 * SECOND, ANSWER)),
    }
    engine = Engine(planted(heads, {}))
    splits = {"facts": {split: prompts(split) for split in SPLITS}}
    return config.removal, behaviours(engine, config.removal, splits, Provenance(), config)


def removed(method, ablation, **changed):
    """The names of what a method ablates, and its row of the table."""
    settings, of_all = opened(**changed)
    knob = Knob(settings.knobs(method)[0], 0)
    (chosen,) = REMOVAL_METHODS[method].load()(RemovalRequest(of_all, settings, ablation, [knob], method))
    item = measured(of_all, chosen, settings.relearn)
    return chosen.ablated, of_all, front(of_all, method, ablation, [knob], [item]).iloc[0]


def assert_removed(row):
    assert row["accuracy_before"] == 1
    assert row["forget_accuracy"] == row["paraphrase_accuracy"] <= 0.25  # of four answers
    assert row["retain_kl_nats"] == row["held_out_kl_nats"] < 1e-3


@pytest.mark.parametrize("ablation", ["optimal", "zero"])
def test_ugs_cuts_the_path_and_nothing_else(ablation):
    ablated, of_all, row = removed("ugs", ablation)
    graph = of_all.engine.graph
    cut = {graph.edge_name(int(s), int(j)) for j, s in np.argwhere(graph.valid & ~ablated.kept.numpy())}
    assert cut and cut <= PATH and len(cut) == row["ablations"] == ablated.size
    assert_removed(row)
    assert np.isnan(row["left_nats"]) == (ablation == "zero")
    assert row["relearned"] and 0 < row["relearn_steps"] <= 16, "other edges say it again"


@pytest.mark.parametrize("ablation", ["optimal", "zero"])
@pytest.mark.parametrize("method", ["ugs_components", "gap", "eap_ig"])
def test_components_of_the_path_are_found(method, ablation):
    ablated, _, row = removed(method, ablation)
    names = {f"a{layer}.h{head}" for layer, head in ablated.heads.nonzero().tolist()}
    assert names and names <= ON_PATH and not ablated.mlps.any()
    assert_removed(row)


def test_random_components_are_drawn_by_the_seed():
    settings, of_all = opened(sizes=[2], methods=["random"])
    knobs = [Knob(2.0, seed) for seed in (0, 1, 0)]
    sets = [chosen.ablated for chosen in REMOVAL_METHODS["random"].load()(
        RemovalRequest(of_all, settings, "zero", knobs, "random"))]  # fmt: skip
    assert [ablated.size for ablated in sets] == [2, 2, 2]
    masks = [torch.cat((ablated.heads.flatten(), ablated.mlps)).tolist() for ablated in sets]
    assert masks[0] == masks[2] != masks[1]


@pytest.mark.parametrize("ablation", ["optimal", "zero"])
def test_three_directions_tell_four_answers_apart(ablation):
    ablated, _, row = removed("linear_erasure", ablation)
    assert ablated.size == 3 and torch.allclose(ablated.basis.T @ ablated.basis, torch.eye(3), atol=1e-5)
    assert_removed(row)
    assert removed("linear_erasure", ablation, ranks=[1])[2]["forget_accuracy"] > 0.25


def test_nothing_is_relearned_where_nothing_was_removed():
    settings, of_all = opened()
    nothing = removed("random", "zero", sizes=[1])[0]
    nothing.heads[:], nothing.mlps[:] = False, False
    assert tuple(relearn(of_all, nothing, 1.0, settings.relearn)) == (0, True, 1.0)


def test_fine_tuning_leaves_the_ablation_in_place():
    """Nothing that only feeds what is ablated takes a gradient; everything else does."""
    _, of_all = opened()
    ablated = removed("gap", "zero")[0]
    ablated.heads[:] = torch.tensor([[True, False], [False, False]])
    weights = {name: getattr(of_all.model.blocks[0], name).clone().requires_grad_() for name in ("W_O", "W_V")}
    block = replace(of_all.model.blocks[0], **weights)
    model = replace(of_all.model, blocks=(block, *of_all.model.blocks[1:]))
    (group,) = of_all.groups["retain"]["test"]
    ablated.logits(of_all.engine, model, group.batch)[:, WORDS // 2 + 1 :].sum().backward()
    assert not weights["W_O"].grad[0].any() and weights["W_O"].grad[1].any()
    assert not weights["W_V"].grad[:, 0].any() and weights["W_V"].grad[:, 1].any()


def test_fine_tuning_leaves_cut_edges_in_place():
    """A head whose edges are all cut takes no gradient, and what they carry stays what the engine's model wrote."""
    ablated, of_all, _ = removed("ugs", "optimal")
    graph = of_all.engine.graph
    head, other = (graph.source_index(name) for name in ("a0.h0", "a0.h1"))
    ablated.kept[:] = torch.tensor(graph.valid)
    ablated.kept[:, head] = False
    weights = {name: getattr(of_all.model.blocks[0], name).clone().requires_grad_() for name in ("W_O", "W_V")}
    block = replace(of_all.model.blocks[0], **weights)
    model = replace(of_all.model, blocks=(block, *of_all.model.blocks[1:]))
    (group,) = of_all.groups["retain"]["test"]
    logits = ablated.logits(of_all.engine, model, group.batch)
    with torch.no_grad():
        expected = ablated.logits(of_all.engine, of_all.model, group.batch)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits[:, WORDS // 2 + 1 :].sum().backward()
    assert head < other and not weights["W_O"].grad[0].any() and weights["W_O"].grad[1].any()
    assert not weights["W_V"].grad[:, 0].any() and weights["W_V"].grad[:, 1].any()


def test_other_components_relearn_what_one_did():
    settings, of_all = opened()
    before = of_all.model.blocks[0].W_V.clone()
    steps, back, accuracy = relearn(of_all, removed("gap", "zero")[0], 1.0, settings.relearn)
    assert back and accuracy == 1 and 0 < steps <= settings.relearn.max_steps
    assert torch.equal(of_all.model.blocks[0].W_V, before)


def test_samplers_count_what_is_ablated():
    """Sizes add up to the expected number of ablated edges, or components; a component's edges share one mask."""
    graph = opened()[1].engine.graph
    source = Edges.of(graph, torch.device("cpu")).index % graph.n_sources
    noise = torch.rand(1, 64, graph.n_edges, generator=torch.Generator().manual_seed(0))
    gone = 1 - torch.tensor(START).sigmoid()
    for sampler, n in ((EdgeSampler(), graph.n_edges), (ComponentSampler(source), graph.n_sources - 1)):
        for window in (False, True):
            sampler.dynamic_window = window
            state = sampler.start(1, graph.n_edges)
            alpha, sizes = sampler.sample(state, noise, {"logit": torch.rand(1, graph.n_edges)}, NOTHING)
            assert torch.allclose(sizes.sum(), n * gone)
            assert ((alpha >= 0) & (alpha <= 1)).all() and 0.8 < alpha.mean() < 1
            if n < graph.n_edges:
                assert all(
                    (alpha[..., source == s].amin(-1) == alpha[..., source == s].amax(-1)).all() for s in range(n)
                )
                assert (alpha[..., source == 0] == 1).all() and not sizes[..., source == 0].any()


def test_what_no_pattern_finds_or_two_do_is_refused():
    for changed, said in (
        (
            {"forget": {"facts": "third"}},
            "removal.forget: facts: 'third' finds 0 of 8 train prompts, such as 'first 1'",
        ),
        ({"retain": {"facts": "[4567]"}}, "removal.retain: facts: '[4567]' finds 'first 4', which is to be forgotten"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            opened(**changed)
