"""Importances of a planted network against closed forms, and against Captum's own perturbation methods."""

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValueSampling
from planted.vision import CHANNELS, CONSTANT, ONE, OTHER, UNUSED, N, loss, pictures, planted, shapley_by_orders

from oacore.config.vision import MEASURES, Vision
from oacore.vision.budgets import Effort
from oacore.vision.fit import fit_alone, fit_together
from oacore.vision.measures import bench, measure
from oacore.vision.units import units_of

SETTINGS = Vision(units=("channels",), layer=1, network={"widths": (CHANNELS,), "branches": 1}, fit={"max_steps": 140})
ZEROS, MEANS = dict.fromkeys(range(CHANNELS), 0.0), {UNUSED: 0.5, CONSTANT: 1.0, ONE: 0.5, OTHER: 0.5}
EXACT = 1e-4


@pytest.fixture(scope="module", params=[0, 1])
def of(request):
    """The channels of the stem, and the same after a branch that adds nothing."""
    network = planted()
    return bench(network, units_of(network, "channels", request.param, (1,)), pictures(), SETTINGS, 100)


def values(of, name, constants=None, **effort):
    return measure(of, MEASURES[name], Effort(N, **effort), constants, 0).values.mean(0)


def fitted(of, name, fit):
    start, spread = of.means[name], of.spread[name]
    return fit(of.train, of.validation, start, spread, SETTINGS.fit, seed=0)


@pytest.mark.parametrize(("name", "carried"), [("zero", ZEROS), ("mean", MEANS)])
def test_each_alone(of, name, carried):
    expected = [loss({channel}, carried) for channel in range(CHANNELS)]
    assert values(of, name).tolist() == pytest.approx(expected, abs=EXACT)
    assert expected[UNUSED] == 0
    assert (expected[CONSTANT] > 5) == (name == "zero"), "a zero is not what the head counts on"
    assert (expected[ONE] > 0.3) == (name == "mean"), "half of a channel that is not missed misleads on dark pictures"


@pytest.mark.parametrize("name", ["optimal", "optimal_positional"])
def test_nothing_is_lost_with_any_channel_alone_at_its_optimal_constant(of, name):
    descent = fitted(of, name, fit_alone)
    assert values(of, name, descent.best).abs().max() < 0.005
    own = of.means[name][next(iter(of.means[name]))][0, 0].numel()
    others = descent.best.reshape(CHANNELS, CHANNELS, own)[ONE, OTHER]
    assert torch.equal(others, torch.full_like(others, 0.5)), "the constants of other channels stay where they were"


def test_another_image_misleads_half_of_the_time(of):
    """The unused and the constant channel say the same; of two copies one may speak for the other kind of picture."""
    found = values(of, "resample", n_draws=8)
    assert found[[UNUSED, CONSTANT]].tolist() == [0, 0]
    assert (found[[ONE, OTHER]] > 0.1).all()


@pytest.mark.parametrize(("name", "carried"), [("zero", ZEROS), ("mean", MEANS)])
def test_shapley_values(of, name, carried):
    expected = shapley_by_orders(carried)
    assert values(of, f"shapley_{name}", n_pairs=16).tolist() == pytest.approx(expected, abs=EXACT)
    assert expected[ONE] == pytest.approx(expected[OTHER]) and expected[ONE] > 1, "either is enough: half for each"
    assert sum(expected) == pytest.approx(loss(set(range(CHANNELS)), carried))
    sampled = measure(of, MEASURES[f"shapley_{name}"], Effort(N, n_pairs=1), None, 0).values  # one pair for each image
    error = sampled.std(0) / N**0.5
    assert ((sampled.mean(0) - torch.tensor(expected)).abs() <= 4 * error + EXACT).all()
    assert sampled.sum(1).mean().item() == pytest.approx(sum(expected), abs=EXACT)


def test_constants_for_sets_are_better_for_sets(of):
    together = fitted(of, "optimal", fit_together).best
    found, zero = values(of, "shapley_optimal", together, n_pairs=16), values(of, "shapley_zero", n_pairs=16)
    assert found.sum() < zero.sum() / 3, "with everything replaced one constant answer is left, the most careful one"
    assert found.sum().item() == pytest.approx(loss_of_the_best_guess(), rel=0.15)
    assert found[[UNUSED, CONSTANT]].abs().max() < 0.1 and found[ONE] > 0.2
    assert found[ONE].item() == pytest.approx(found[OTHER].item(), rel=0.2)


def loss_of_the_best_guess():
    """Nats that are lost with everything at constants: a mean of two sure answers is left, ln 2."""
    return torch.log(torch.tensor(2.0)).item()


@pytest.mark.parametrize("name", ["zero", "mean"])
def test_gradients_share_out_what_all_cost(of, name):
    carried = {"zero": ZEROS, "mean": MEANS}[name]
    found = measure(of, MEASURES[f"integrated_gradients_{name}"], Effort(N), None, 0).values.mean(0)
    assert found[UNUSED].item() == pytest.approx(0, abs=EXACT)
    assert found[ONE].item() == pytest.approx(found[OTHER].item(), abs=EXACT)
    assert found.sum().item() == pytest.approx(loss(set(range(CHANNELS)), carried), rel=0.1)
    assert (found[CONSTANT].abs() < EXACT).item() == (name == "mean")


def test_conductance_is_of_what_the_picture_changes(of):
    found = values(of, "conductance")
    assert found[[UNUSED, CONSTANT]].abs().max() < EXACT, "an empty picture has the constant, too"
    assert found[ONE].item() == pytest.approx(found[OTHER].item(), abs=EXACT) and found[ONE] > 1


def test_captum_s_perturbations_give_the_same(of):
    """Feature ablation is ablation one by one; sampling of Shapley values has the same mean."""
    images, kept = torch.arange(N), torch.ones(N, CHANNELS)

    def value(gates, rows):
        return -of.test.losses_of(rows, gates, lambda part: of.means["zero"])

    alone = FeatureAblation(value).attribute(kept, torch.zeros_like(kept), additional_forward_args=(images,))
    assert alone.mean(0).tolist() == pytest.approx(values(of, "zero").tolist(), rel=1e-5)
    torch.manual_seed(0)
    sampling = ShapleyValueSampling(value)
    sampled = sampling.attribute(kept, torch.zeros_like(kept), additional_forward_args=(images,), n_samples=200)
    assert sampled.mean(0).tolist() == pytest.approx(shapley_by_orders(ZEROS), abs=1.0)  # of 12, by one order for all


def test_the_same_seed_gives_the_same_bits(of):
    for name in ("shapley_resample", "resample", "shapley_zero"):
        first, second = (measure(of, MEASURES[name], Effort(N - 5, n_pairs=1, n_draws=2), None, 3) for _ in range(2))
        assert torch.equal(first.values, second.values) and torch.equal(first.images, second.images)
        other = measure(of, MEASURES[name], Effort(N - 5, n_pairs=1, n_draws=2), None, 4)
        assert not torch.equal(first.images, other.images) and first.n_passes == other.n_passes
