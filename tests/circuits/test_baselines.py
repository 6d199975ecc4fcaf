"""Baselines: EAP, EAP-IG and exact scores against single passes, ACDC against a plain sweep, random and manual
circuits.
"""

import numpy as np
import pytest
import torch
from test_mask_learning import Setting

from oacore.circuits.acdc import acdc, sweep_order
from oacore.circuits.eap import eap_ig_scores, eap_scores
from oacore.circuits.exact import exact_scores
from oacore.circuits.manual import manual_ioi
from oacore.circuits.random import random_circuits
from oacore.errors import UserError
from oacore.models.graph import Graph

CHOSEN = torch.tensor([4, 1, 6])


@pytest.fixture(scope="module")
def setting():
    return Setting()


def losses(setting, ablation, masks, objective):
    """Mean loss of each mask [M, J, S] on the chosen prompts, one pass a mask."""
    replacements, slots = setting.replacements(ablation), torch.arange(len(CHOSEN))
    values, passes = replacements.of(CHOSEN), setting.passes()
    return [
        float(passes.losses(objective, CHOSEN, slots, mask[None], values, owned=replacements.per_prompt).mean())
        for mask in masks
    ]


def clean_mask(setting):
    return torch.tensor(setting.engine.graph.valid).float()


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_eap_is_the_slope_of_the_loss_in_each_edge(setting, ablation):
    scores = eap_scores(setting.passes(), setting.replacements(ablation), "logit_diff", CHOSEN)
    clean, step = clean_mask(setting), 0.02
    edges = torch.tensor(setting.engine.graph.valid).nonzero()[::23]
    for j, s in edges.tolist():
        masks = clean.repeat(2, 1, 1)
        masks[0, j, s] -= step
        masks[1, j, s] += step
        less, more = losses(setting, ablation, masks, "logit_diff")
        assert float(scores[j, s]) == pytest.approx((less - more) / (2 * step), abs=2e-3, rel=0.02)
    assert not scores[~torch.tensor(setting.engine.graph.valid)].any()


def test_eap_refuses_kl(setting):
    with pytest.raises(ValueError, match="no gradient"):
        eap_scores(setting.passes(), setting.replacements("mean"), "kl", CHOSEN)


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_eap_ig_on_the_way_of_the_input(setting, ablation):
    """Edges out of `input` carry the same difference at every step, so with many steps their scores add up to the loss
    of replacing it.
    """
    graph = setting.engine.graph
    scores = eap_ig_scores(setting.passes(), setting.replacements(ablation), "kl", CHOSEN, 64)
    clean = clean_mask(setting)
    without = clean.clone()
    without[:, 0] = 0
    before, after = losses(setting, ablation, [clean, without], "kl")
    assert float(scores[:, 0].sum()) == pytest.approx(after - before, rel=0.05, abs=1e-3)
    assert not scores[~torch.tensor(graph.valid)].any()


def test_one_step_of_eap_ig_is_eap(setting):
    one = eap_ig_scores(setting.passes(), setting.replacements("counterfactual"), "logit_diff", CHOSEN, 1)
    plain = eap_scores(setting.passes(), setting.replacements("counterfactual"), "logit_diff", CHOSEN)
    torch.testing.assert_close(one, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_exact_scores_are_single_ablations(setting, ablation):
    scores = exact_scores(
        setting.passes(), setting.replacements(ablation), "kl", CHOSEN, edges_at_once=7, most_passes=10**6
    )
    clean = clean_mask(setting)
    (before,) = losses(setting, ablation, [clean], "kl")
    for j, s in torch.tensor(setting.engine.graph.valid).nonzero()[::31].tolist():
        mask = clean.clone()
        mask[j, s] = 0
        assert float(scores[j, s]) == pytest.approx(
            losses(setting, ablation, [mask], "kl")[0] - before, abs=1e-6, rel=1e-4
        )
    with pytest.raises(UserError, match="'exact' takes 786 passes"):
        exact_scores(setting.passes(), setting.replacements(ablation), "kl", CHOSEN, edges_at_once=7, most_passes=100)


def plain_acdc(setting, ablation, threshold, objective):
    """Edge after edge, one pass each."""
    graph = setting.engine.graph
    mask = graph.valid.copy()
    (current,) = losses(setting, ablation, [torch.from_numpy(mask).float()], objective)
    for j, s in sweep_order(graph):
        if not mask[j, s]:
            continue
        without = mask.copy()
        without[j, s] = False
        without = graph.prune(without)
        (loss,) = losses(setting, ablation, [torch.from_numpy(without).float()], objective)
        if loss - current < threshold:
            mask, current = without, loss
    return mask


@pytest.mark.parametrize(("ablation", "objective"), [("mean", "kl"), ("counterfactual", "logit_diff")])
def test_acdc_equals_the_plain_sweep(setting, ablation, objective):
    thresholds = [1e-5, 1e-4] if objective == "kl" else [1e-3, 5e-3]
    arguments = (setting.passes(), setting.replacements(ablation), thresholds, CHOSEN, objective)
    masks, rises = acdc(*arguments, guesses=4)
    for index, threshold in enumerate(thresholds):
        assert np.array_equal(masks[index], plain_acdc(setting, ablation, threshold, objective))
        assert (rises[index][masks[index]] >= threshold).all()
    one_by_one, _ = acdc(*arguments, guesses=1)
    assert np.array_equal(one_by_one, masks)
    assert 0 < masks[1].sum() < masks[0].sum() < setting.engine.graph.n_edges


def test_acdc_walks_from_the_logits_to_the_input():
    graph = Graph(2, 2, 1, False)
    names = [graph.edge_name(int(s), int(j)) for j, s in sweep_order(graph)]
    assert names[0] == "m1->logits" and names[-1] == "input->a0.h0<q>" and len(names) == graph.n_edges
    assert names.index("a1.h0->m1") < names.index("m0->a1.h0<v>") < names.index("a0.h1->m0")


def test_random_circuits_have_the_sizes_asked_for():
    graph = Graph(3, 4, 2, False)
    sizes = [5, 20, 100, graph.n_edges]
    masks = random_circuits(graph, sizes, seed=1)
    found = graph.size(masks).edges
    assert (found >= sizes).all() and (found <= np.array(sizes) + 20).all() and found[-1] == graph.n_edges
    assert np.array_equal(masks, random_circuits(graph, sizes, seed=1)) and not np.array_equal(
        masks, random_circuits(graph, sizes, seed=2)
    )
    with pytest.raises(UserError, match="allowed: up to"):
        random_circuits(graph, [graph.n_edges + 1], seed=0)


def test_the_manual_circuit():
    """ACDC counts 1,041 edges: these, and one into each of the 26 heads for its q, k and v."""
    graph = Graph(12, 12, 12, False)
    mask = manual_ioi(graph)
    assert mask.sum() == 1041 - 26 * 3 and np.array_equal(graph.prune(mask), mask)
    for name, kept in (
        ("a9.h9->logits", True),
        ("a2.h2->a5.h5<k>", True),
        ("a2.h2->a5.h5<q>", False),
        ("a8.h6->a9.h9<q>", True),
    ):
        s, j = graph.edge(name)
        assert mask[j, s] == kept, name
    with pytest.raises(UserError, match="GPT-2-small"):
        manual_ioi(Graph(4, 4, 4, False))
