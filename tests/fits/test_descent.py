"""Rounds of descent on problems whose optimum is known: when they stop, what they say is left, what they try again."""

import pytest
import torch

from oacore.config.base import OptimalFit
from oacore.fits import resume
from oacore.fits.convergence import Convergence, of_descent, read_convergence
from oacore.fits.descent import Descent, descend
from oacore.fits.record import descent_of, items_of_fits, recorded, write_fits
from oacore.fits.resume import Resumable
from oacore.store.provenance import Provenance

WIDTH, FLOOR = 40, 0.5  # coordinates of a fit, and its loss at the optimum


class Noisy:
    """Bowls 0.5 sum h (x - x*)^2 + FLOOR, whose gradients carry noise as a batch's do; the optimum is known."""

    def __init__(self, n=3, noise=0.3):
        draw = torch.Generator().manual_seed(0)
        self.curvature = torch.logspace(-2, 0, WIDTH).expand(n, -1)
        self.optimum = torch.randn(n, WIDTH, generator=draw)
        self.noise = noise

    def gradient(self, running, values, step):
        rows = running.index
        draw = torch.Generator().manual_seed(step)
        noise = torch.randn(WIDTH, generator=draw) * self.curvature[rows].sqrt()
        return self.curvature[rows] * (values - self.optimum[rows]) + self.noise * noise

    def validate(self, running, values):
        rows = running.index
        return 0.5 * (self.curvature[rows] * (values - self.optimum[rows]).square()).sum(1) + FLOOR

    def fit(self, settings, **kwargs):
        start = torch.zeros(len(self.optimum), WIDTH)
        names = [f"fit {row}" for row in range(len(start))]
        unit = torch.ones(1, 1)
        return descend(start, unit, self.gradient, self.validate, settings, names=names, key="rate", **kwargs)


def test_rounds_double_and_the_last_takes_what_is_left():
    ends = {cap: OptimalFit(first_round=50, max_steps=cap).round_ends for cap in (10, 149, 150, 400, 3150)}
    assert ends[10] == [10] and ends[149] == [149] and ends[150] == [50, 150] and ends[400] == [50, 150, 400]
    assert ends[3150] == [50, 150, 350, 750, 1550, 3150]


def test_a_converged_fit_is_within_its_tolerance_of_the_optimum():
    found = Noisy().fit(OptimalFit(tolerance=0.03, max_steps=51150))
    assert found.converged.all() and (found.n_steps < 51150).all()
    excess = found.best_loss - FLOOR
    assert (excess <= 0.03 * FLOOR).all()
    assert (found.left <= 0.0301 * found.best_loss + 1e-6).all()


def test_what_is_said_to_be_left_is_about_what_is_left():
    for cap in (150, 350, 750):
        found = Noisy().fit(OptimalFit(tolerance=1e-4, max_steps=cap))
        assert not found.converged.any() and (found.n_steps == cap).all()
        truth = found.best_loss - FLOOR
        assert (found.left < 6 * truth).all() and (found.left > truth / 6).all()


@pytest.mark.parametrize(("first_round", "cap"), [(75, 1050), (50, 749)])
def test_a_last_round_that_takes_what_the_cap_leaves_says_no_more_than_others(first_round, cap):
    """It is several times as long as usual; taken for a usual one it said 3 to 15 times what is left."""
    found = Noisy().fit(OptimalFit(first_round=first_round, tolerance=1e-4, max_steps=cap))
    truth = found.best_loss - FLOOR
    assert (found.left < 3 * truth).all() and (found.left > truth / 3).all()


@pytest.mark.parametrize("rate", [2e-4, 30.0])
def test_a_rate_that_is_too_low_or_too_high_is_tried_again(capsys, rate):
    """At 2e-4 a first round of 50 steps moves a coordinate by at most 0.005; at 30 it ends far from the optimum."""
    found = Noisy().fit(OptimalFit(learning_rate=rate, max_steps=3150))
    start = found.curve_losses[0]
    assert (found.best_loss - FLOOR < 0.1 * (start - FLOOR)).all()
    assert "warning" not in capsys.readouterr().err


def test_a_fit_that_never_leaves_its_start_is_warned_of(capsys):
    problem = Noisy()
    problem.gradient = lambda running, values, step: torch.zeros_like(values)
    found = problem.fit(OptimalFit(max_steps=3150), what="ioi optimal")
    text = capsys.readouterr().err
    assert (
        "warning: ioi optimal: no better than its start, at any rate that was tried: fit 0, fit 1, fit 2 (3 of 3"
        in text
    )
    assert torch.equal(found.best_loss, found.curve_losses[0])
    assert (found.n_steps == 750).all(), "two more rounds at higher rates, and one more to be sure"


def test_a_fit_whose_start_loses_nothing_ends_without_a_warning(capsys):
    problem = Noisy()
    problem.validate = lambda running, values: torch.zeros(len(running.rows))
    found = problem.fit(OptimalFit(max_steps=3150))
    assert found.converged.all() and (found.n_steps == 50).all()
    assert "warning" not in capsys.readouterr().err


def test_a_round_that_overfits_is_not_kept():
    """From the second round on gradients lead away from the validation optimum, as with too few training prompts."""
    problem, plain = Noisy(noise=0), Noisy(noise=0).gradient
    problem.gradient = lambda running, values, step: (
        plain(running, values, step) if step < 50 else -torch.ones_like(values)
    )
    found = problem.fit(OptimalFit(max_steps=3150))
    assert torch.equal(found.best_loss, found.curve_losses[1]) and (found.left == 0).all()
    assert (found.curve_losses[2] > found.best_loss).all()


class KilledError(Exception):
    """Stands for a killed job."""


@pytest.mark.parametrize("at", [20, 95, 150])
def test_killed_within_a_round_it_goes_on_to_the_same_bits(tmp_path, monkeypatch, at):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0)
    settings = OptimalFit(max_steps=350, tolerance=1e-4)
    whole, killed = Noisy().fit(settings), Noisy()
    plain = killed.gradient

    def kill(running, values, step):
        if step == at:
            raise KilledError
        return plain(running, values, step)

    killed.gradient = kill
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KilledError):
        killed.fit(settings, resumable=Resumable(path, "a"))
    saved = int(Resumable(path, "a").load()["step"])
    assert saved == max(end for end in (20, 40, 50, 70, 90, 110, 130, 150) if end <= at)
    resumed = Noisy().fit(settings, resumable=Resumable(path, "a"))
    for name in ("best", "best_loss", "left", "n_steps", "converged", "curve_losses"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_convergence_on_disk_is_that_of_the_descent(tmp_path):
    found, names = Noisy().fit(OptimalFit(max_steps=150, tolerance=0.3)), ["a", "b", "c"]
    path, provenance = tmp_path / "fits.safetensors", Provenance({"model_hash": "m"})
    write_fits(path, recorded({"x": found.best}, found), names, provenance)
    assert list(read_convergence(path, provenance).values()) == of_descent(found)


@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[2, 0], [1]], [[0, 1, 2]]])
def test_fits_taken_apart_and_put_together_are_the_same_fits(groups):
    """The curve of a fit that ended early stays where it was, as in the descent that it was part of."""
    draw = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 3, generator=draw)
    losses[2:, 0], losses[3:, 1] = losses[1, 0], losses[2, 1]
    found = Descent(
        torch.rand(3, 5, generator=draw),
        torch.rand(3, generator=draw),
        torch.rand(3, generator=draw),
        torch.tensor([75, 225, 525]),
        torch.tensor([True, True, False]),
        torch.tensor([0, 75, 225, 525]),
        losses,
    )
    items = items_of_fits(found, groups)
    assert [len(item.tensors["curve_steps"]) for item in items] == [
        max({0: 2, 1: 3, 2: 4}[row] for row in rows) for rows in groups
    ], "an item does not know how long others went on"
    joined, wanted = descent_of(items), found.take([row for rows in groups for row in rows])
    for name in ("best", "best_loss", "left", "n_steps", "converged", "curve_steps", "curve_losses"):
        assert torch.equal(getattr(joined, name), getattr(wanted, name)), name


def test_a_number_of_two_fits_has_converged_if_both_have():
    both = Convergence.together([Convergence(True, 50, 0.1), Convergence(False, 150, 0.2)])
    assert both == Convergence(False, 150, pytest.approx(0.3))
