"""The parts that measurements are made of: gated passes, Shapley values, budgets, agreement, curves."""

from math import factorial

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import kl_div

from oacore.config.vision import MEASURES, Network, Vision
from oacore.errors import UserError
from oacore.metrics import spearman
from oacore.vision.agreement import agreement, between
from oacore.vision.budgets import effort_within, fit_passes, full_effort, image_passes, training_passes
from oacore.vision.curves import area, curve
from oacore.vision.data import digest, digits
from oacore.vision.fit import fit_alone, fit_together, random_sets
from oacore.vision.measures import Measurement, bench, measure
from oacore.vision.passes import Passes
from oacore.vision.shapley import exact, sampled
from oacore.vision.source import accuracy_and_loss
from oacore.vision.study import shuffled
from oacore.vision.train import check_accuracy, train
from oacore.vision.units import units_of

SMALL = Vision(
    layer=2,
    images={"n_network": 200, "n_train": 40, "n_validation": 10, "n_test": 30},
    network={"widths": (4, 6), "branches": 2, "n_steps": 200},
    fit={"batch_size": 5, "first_round": 4, "max_steps": 12},
    n_pairs=2,
    ig_steps=4,
)
KINDS = ("channels", "branches", "blocks")


@pytest.fixture(scope="module")
def splits():
    return digits(SMALL.splits, 0)


@pytest.fixture(scope="module")
def network(splits):
    found = train(SMALL.network, splits["network"], 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in found.parameters():  # no two units alike, none without a part
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.fixture(scope="module", params=KINDS)
def of(request, network, splits):
    units = units_of(network, request.param, SMALL.layer, (2, 2))
    return bench(network, units, splits, SMALL, 64)


def test_kinds_of_units(network):
    found = {kind: units_of(network, kind, 2, (2, 2)) for kind in KINDS}
    assert [len(units) for units in found.values()] == [SMALL.n_units(kind) for kind in KINDS] == [4, 4, 2]
    assert found["blocks"].names == ("block 1", "block 2") and found["blocks"].layers[1] == "branches 3, 4"
    assert list(found["branches"].owners) == ["1.branch", "2.branch", "3.branch", "4.branch"]
    assert list(units_of(network, "channels", 0, (2, 2)).owners) == ["0"]


def test_splits_share_no_image(splits):
    pixels = torch.cat([split.pixels for split in splits.values()]).flatten(1)
    assert [len(split) for split in splits.values()] == [200, 40, 10, 30]
    assert len(pixels.unique(dim=0)) == len(pixels)
    assert digest(splits) == digest(digits(SMALL.splits, 0)) != digest(digits(SMALL.splits, 1))


def test_training_is_repeatable_and_learns(splits):
    first, second = (train(SMALL.network, splits["network"], 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    accuracy, nats = accuracy_and_loss(first, splits["test"], 7)
    assert accuracy > 0.5 and nats < 1.6
    with pytest.raises(UserError, match=r"vision\.network: training failed.*required 0.9.*n_steps: 200"):
        check_accuracy(0.5, SMALL.network)


def test_a_pass_by_the_brute_force(of):
    """Every part written out, with the replacement put in by hand."""
    passes, rows = of.test, torch.arange(30)
    gates = random_sets(of.n, 30, 1)
    values, network = of.means["mean"], passes.network

    def edited(place, value):
        if place not in passes.units.owners:
            return value
        keep = gates[:, passes.units.owners[place]].bool()[..., None, None]
        return torch.where(keep, value, values[place])

    stream = edited("0", network[0](passes.pixels))
    for number in range(1, len(network) - 1):
        part = network[number]
        branch = edited(f"{number}.branch", part.branch(stream))
        stream = edited(str(number), torch.relu(part.skip(stream) + branch))
    expected = kl_div(network[-1](stream).log_softmax(-1), passes.clean, reduction="none", log_target=True).sum(-1)
    found = passes.losses_of(rows, gates, lambda part: values)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6) and found.max() > 0.01
    assert passes.losses_of(rows, torch.ones(30, of.n), lambda part: values).abs().max() == 0
    assert all(not module._forward_hooks for module in network.modules()), "every hook is gone"


@pytest.mark.parametrize("n", [1, 3, 4])
def test_shapley_values_of_a_game_with_known_ones(n):
    """Weights of single units, and one that needs the first two: its value is shared by them."""
    weights, pair = torch.arange(1.0, n + 1), 6.0 if n > 1 else 0.0

    def loss(rows, gates, draws):
        out = 1 - gates
        both = out[:, 0] * out[:, 1] if n > 1 else 0
        return out @ weights + pair * both + rows * out.sum(1)

    images = torch.tensor([0, 2])
    expected = weights + images[:, None].float()
    if n > 1:
        expected[:, :2] += pair / 2
    assert torch.allclose(exact(loss, images, n), expected.double())
    # A pair of an order and its reverse is exact for a game of pairs.
    assert torch.allclose(sampled(loss, images, n, 1, 0), expected.double())


def test_sampled_shapley_values_are_unbiased():
    """Against all sets, in a game of three units at once."""

    def loss(rows, gates, draws):
        out = 1 - gates
        return out[:, 0] * out[:, 1] * out[:, 2] + 0.5 * (1 - gates[:, 1] * gates[:, 3])

    images = torch.zeros(4000, dtype=torch.long)
    found, truth = sampled(loss, images, 4, 1, 0), exact(loss, images[:1], 4)[0]
    assert ((found.mean(0) - truth).abs() <= 4 * found.std(0) / 4000**0.5 + 1e-6).all()
    assert truth.sum().item() == pytest.approx(1.5)


def test_random_sets_have_every_size_alike():
    replaced = (1 - random_sets(5, 20000, 0)).sum(1)
    assert replaced.min() == 1
    share = torch.bincount(replaced.long(), minlength=6)[1:] / 20000
    assert share.tolist() == pytest.approx([0.2] * 5, abs=0.02)


@pytest.mark.parametrize("name", MEASURES)
def test_forward_passes_are_counted(of, name, monkeypatch):
    """What the formulas say is what runs: rows, a gradient as three, the means and the clean passes."""
    counted, row = [0], MEASURES[name]
    run = Passes.losses

    def counting(self, rows, gates, values):
        counted[0] += len(rows) * (3 if torch.is_grad_enabled() else 1)
        return run(self, rows, gates, values)

    monkeypatch.setattr(Passes, "losses", counting)
    effort, constants, fitted = full_effort(row, SMALL), None, 0
    if effort.max_steps:
        fit = fit_together if row.family == "shapley" else fit_alone
        descent = fit(of.train, of.validation, of.means[row.replacement], of.spread[row.replacement], SMALL.fit, seed=0)
        constants, steps = descent.best, descent.n_steps.tolist()
        fitted, clean = fit_passes(row, of.n, steps, SMALL, SMALL.fit.max_steps), SMALL.fit.batch_size * max(steps)
        assert counted[0] == fitted - clean
        counted[0] = 0
    found = measure(of, row, effort, constants, 0)
    expected = 30 * image_passes(row, of.n, len(of.test.units.owners), effort, SMALL)
    assert found.n_passes == expected and found.values.shape == (30, of.n)
    if name != "conductance":  # which asks the network itself
        assert counted[0] == expected - 30
    means = training_passes(row, SMALL)
    assert means == (0 if "zero" in name or "resample" in name or name == "conductance" else 40)


@pytest.mark.parametrize("name", MEASURES)
def test_efforts_stay_within_budgets(name):
    settings, row = Vision(), MEASURES[name]
    for n, n_places in ((16, 1), (6, 6), (64, 1)):
        for budget in (100, 1000, 7000, 30000, 10**6):
            effort = effort_within(budget, row, n, n_places, settings)
            if effort is None:
                assert budget < 100_000
                continue
            fitted = fit_passes(row, n, [effort.max_steps] * n, settings, effort.max_steps) if effort.max_steps else 0
            once = effort.n_images * image_passes(row, n, n_places, effort, settings)
            assert fitted + once + training_passes(row, settings) <= budget
            assert 2 <= effort.n_images <= settings.images.n_test


def test_rank_correlation_is_spearman_s():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (6, 9)).astype(float), rng.normal(size=(6, 9))
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert spearman(first, second) == pytest.approx(expected)
    assert np.isnan(spearman(np.ones((1, 9)), second[:1])).all()


def test_agreement_has_an_interval_and_knows_runs_apart():
    truth, generator = torch.arange(8.0).double(), torch.Generator().manual_seed(0)

    def run(noise, images=50):
        values = truth + noise * torch.randn(images, 8, generator=generator, dtype=torch.float64)
        return Measurement(values, torch.arange(images), 0)

    reference, close, far = run(0.1), run(1.0), run(60.0, 20)
    near, low = agreement([close], reference, 0), agreement([far], reference, 0)
    assert near.spearman == near.high == 1 and near.low > 0.9
    assert low.spearman < 0.8 and low.low < low.high and low.high - low.low > 0.3
    assert agreement([close], reference, 0) == near
    assert between([close, reference]) == 1 and between([far, close]) < 0.9 and np.isnan(between([close]))


def test_curves_end_where_everything_or_nothing_is_replaced(of):
    order, values = torch.arange(of.n).flip(0), of.means["zero"]
    deletion, insertion = (curve(of.test, order, values, way) for way in ("deletion", "insertion"))
    nothing, everything = torch.zeros(30), deletion[:, -1]
    assert torch.equal(deletion[:, 0], nothing) and torch.equal(insertion[:, -1], nothing)
    assert insertion[:, 0].tolist() == pytest.approx(everything.tolist(), rel=1e-5) and everything.mean() > 0.1
    alone = measure(of, MEASURES["zero"], full_effort(MEASURES["zero"], SMALL), None, 0).values
    assert deletion[:, 1].tolist() == pytest.approx(alone[:, -1].tolist(), rel=1e-4, abs=1e-6)
    assert area(torch.tensor([[0.0, 1.0, 2.0]])).item() == 1


def test_shuffled_weights_are_the_same_numbers_elsewhere(network):
    head, everything = shuffled(network, "head", 0), shuffled(network, "all", 0)
    for (name, before), after, all_after in zip(
        network.named_parameters(), head.parameters(), everything.parameters(), strict=True
    ):
        assert torch.equal(before.flatten().sort().values, all_after.flatten().sort().values)
        assert torch.equal(before, after) == (not name.startswith(str(len(network) - 1)))
        assert before.numel() < 8 or not torch.equal(before, all_after)


def test_weights_of_sets_are_shapley_s():
    """|S|! (n - |S| - 1)! / n!, as the textbook has them."""
    seen = []

    def loss(rows, gates, draws):
        seen.append(gates)
        return torch.eye(len(gates))[-1]  # all units replaced, alone

    found = exact(loss, torch.zeros(1, dtype=torch.long), 3)
    assert found.tolist() == [[pytest.approx(factorial(2) * factorial(0) / factorial(3))] * 3]
    assert len(seen[0].unique(dim=0)) == 2**3 - 1 and not seen[0].all(1).any()


def test_a_network_of_other_sizes_is_one():
    assert Vision(network=Network(widths=(4,), branches=1), layer=1).n_units("channels") == 4
