"""Do the methods find circuits that are known? Edge AUROC against planted ones; `tests/bench/bench_planted.py` prints
it for all.
"""

import bench_planted
import numpy as np
import pytest
from bench_planted import METHODS, Setting, learned

from oacore.circuits.topk import TopKSampler
from oacore.circuits.ugs import UniformSampler
from planted.circuit import auroc, chain, induction


def quality(method, planted, ablation, seed=0):
    scores = method(Setting(planted, ablation), seed)
    return auroc(np.abs(scores), planted.true_edges, planted.model.graph.valid)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench_planted, "STEPS", 150)


@pytest.mark.parametrize("ablation", ["optimal", "counterfactual"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("circuit", [induction, chain])
def test_ugs_finds_planted_circuits(short, circuit, seed, ablation):
    assert quality(learned(UniformSampler()), circuit(seed), ablation) >= 0.95


@pytest.mark.parametrize("circuit", [induction, chain])
@pytest.mark.parametrize(
    ("method", "least"), [("exact", 0.99), ("acdc", 0.99), ("eap_ig", 0.95), ("hcgs", 0.9), ("eap", 0.7)]
)
def test_baselines_find_planted_circuits(short, circuit, method, least):
    assert quality(METHODS[method], circuit(2), "counterfactual") >= least


def test_topk_finds_a_planted_circuit(short):
    import torch

    planted = induction(3)
    sampler = TopKSampler(torch.tensor([float(planted.true_edges.sum())]))
    assert quality(learned(sampler), planted, "counterfactual") >= 0.95
