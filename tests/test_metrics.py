"""Losses against float64: exact where they are small, 0 where they are rounding, and never negative."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oacore.metrics import RESOLUTION, clustered_means_and_ses, kl_divergence, kl_of_log_probs, zero_below


def in_float64(target_logits, logits):
    p, q = (x.double().log_softmax(-1) for x in (target_logits, logits))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)  # it rounds, too: -1e-16


@given(st.integers(0, 10**6), st.integers(2, 300), st.floats(0.1, 30.0), st.floats(-8.0, 1.0))
@settings(max_examples=100, deadline=None)
def test_small_losses_are_exact_and_none_is_negative(seed, n_tokens, size, exponent):
    """The logits' own rounding, 1e-6 of their size, is all that shows: |d KL| <= |q - p| |d logits|, and |q - p|^2 is
    at most 2 KL.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(3, n_tokens, generator=draw)
    target = logits + 10**exponent * torch.randn(3, n_tokens, generator=draw)
    found, exact = kl_divergence(target.log_softmax(-1), logits).double(), in_float64(target, logits)
    assert bool((found >= 0).all())
    assert bool(((found - exact).abs() <= RESOLUTION + 1e-6 * size * exact.sqrt() + 1e-5 * exact).all()), (found, exact)


def test_a_loss_that_is_rounding_is_0():
    """Two ways to round the same logits, as two machines or two sizes of a batch have them. Summed term by term it
    would be anything.
    """
    logits = 10 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = logits.float(), (logits * (1 + 2e-7)).float()
    target = one.log_softmax(-1)
    assert not torch.equal(one, two)
    assert (kl_divergence(target, two) == 0).all()
    summed = (target.exp() * (target - two.log_softmax(-1))).sum(-1)
    assert summed.min() < -1e-8, "the test's logits no longer show what it is about"


def test_losses_of_distributions_that_hardly_overlap():
    logits = torch.tensor([[0.0, -150.0, -300.0], [-300.0, 0.0, -150.0]], requires_grad=True)
    target = torch.tensor([[-200.0, 0.0, -90.0]])
    losses = kl_divergence(target.log_softmax(-1), logits)
    assert torch.allclose(losses.double(), in_float64(target, logits), rtol=1e-6)
    losses.sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - target.softmax(-1), atol=1e-7)


@pytest.mark.parametrize("shapes", [((4, 7), (4, 7)), ((4, 7), (2, 4, 7)), ((2, 4, 7), (4, 7)), ((7,), (2, 4, 7))])
def test_the_gradient_is_that_of_the_plain_sum(shapes):
    draw = torch.Generator().manual_seed(0)
    target, plain = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    ours, plain = plain.clone().requires_grad_(), plain.requires_grad_()
    losses, expected = kl_divergence(target.log_softmax(-1), ours), in_float64(target, plain)
    weights = torch.rand(expected.shape, generator=draw, dtype=torch.float64)
    for loss in (losses, expected):
        (loss * weights).sum().backward()
    assert torch.allclose(losses, expected) and torch.allclose(ours.grad, plain.grad)


def test_a_loss_of_0_has_the_gradient_of_its_rounding():
    """Cut off in the value alone: a fit that has arrived is not pushed away, and one that is near is still pulled."""
    logits = torch.zeros(4, requires_grad=True)
    target = torch.tensor([1e-5, 0.0, 0.0, -1e-5]).log_softmax(-1)
    loss = kl_divergence(target, logits)
    loss.backward()
    assert loss == 0
    assert torch.allclose(logits.grad, torch.tensor([-2.5e-6, 0, 0, 2.5e-6]), atol=1e-7)


def test_what_is_not_finite_stays():
    target = torch.zeros(3).log_softmax(-1)
    for bad in (float("nan"), float("inf")):
        assert not kl_divergence(target, torch.tensor([0.0, bad, 0.0])).isfinite()
    assert kl_of_log_probs(torch.tensor([0.0, -1e4]), torch.tensor([-float("inf"), 0.0])) == float("inf")
    values = zero_below(torch.tensor([float("nan"), float("inf"), -1e-7, 1e-7, 1e-6, -2.0]), 1e-6)
    assert torch.equal(values[1:], torch.tensor([float("inf"), 0.0, 0.0, 1e-6, -2.0])) and values[0].isnan()


def test_standard_errors_are_those_of_repeated_experiments():
    """Values that share a part within clusters of unequal sizes: the error over clusters is the spread of the mean over
    3000 experiments; the plain one, over single values, is not half of it.
    """
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), draw.integers(1, 10, 40))
    shared, own = draw.standard_normal((3000, 40)), draw.standard_normal((3000, len(clusters)))
    values = shared[:, clusters] + 0.3 * own
    means, errors = clustered_means_and_ses(torch.from_numpy(values), clusters)
    spread = means.std()
    assert np.sqrt((errors**2).mean()) == pytest.approx(spread, rel=0.06)
    _, plain = clustered_means_and_ses(torch.from_numpy(values), np.arange(len(clusters)))
    assert plain.mean() < 0.5 * spread
