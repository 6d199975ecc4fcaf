"""Whitened steps against matrix roots, on problems whose coordinates are coupled, and alone beside company."""

import math

import pytest
import torch
from scipy.linalg import sqrtm

from oacore.config.base import OptimalFit
from oacore.fits import resume
from oacore.fits.descent import descend
from oacore.fits.resume import Resumable
from oacore.fits.whitening import DAMPING, DECAY, PACE, Whitening, blocks_of

WIDTHS = (3, 5, 3)
N = sum(WIDTHS)


def test_blocks_are_consecutive_coordinates_by_width():
    blocks = {width: index.tolist() for width, index in blocks_of(WIDTHS).items()}
    assert blocks == {3: [[0, 1, 2], [8, 9, 10]], 5: [[3, 4, 5, 6, 7]]}


def test_a_direction_is_the_momentum_after_the_inverse_root_of_the_moments():
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 2, N, generator=draw)
    unit = torch.rand(1, N, generator=draw).expand(2, -1) + 0.5
    whitening, rows = Whitening(WIDTHS, unit), torch.arange(2)
    state = whitening.initial_state()
    for gradient in gradients:
        whitening.see(state, rows, gradient)
    whitening.refresh(state, rows, len(gradients))
    momentum = torch.randn(2, N, generator=draw)
    found = whitening.direction(rows, momentum)

    weights = torch.tensor([DECAY ** (29 - step) for step in range(30)], dtype=torch.float64)
    for row in range(2):
        scaled = (gradients[:, row] * unit[row]).double()
        ends = torch.tensor(WIDTHS).cumsum(0).tolist()
        for width, end in zip(WIDTHS, ends, strict=True):
            part = scaled[:, end - width : end]
            moments = torch.einsum("s,si,sj->ij", weights / weights.sum(), part, part)
            damped = moments + DAMPING * moments.trace() / width * torch.eye(width)
            root = torch.from_numpy(sqrtm(damped.numpy()).real)
            wanted = PACE * torch.linalg.solve(root, (momentum[row] * unit[row])[end - width : end].double())
            torch.testing.assert_close(found[row, end - width : end].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_without_a_gradient_stays():
    whitening, rows = Whitening((4,), torch.ones(1, 4)), torch.arange(1)
    state = whitening.initial_state()
    whitening.refresh(state, rows, 1)
    assert torch.equal(whitening.direction(rows, torch.zeros(1, 4)), torch.zeros(1, 4))


class KilledError(Exception):
    """Stands for a killed job."""


class Coupled:
    """Bowls in rotated coordinates, whose gradients carry noise as a batch's do: no coordinate has a curvature of its
    own.
    """

    def __init__(self, rows=(0, 1, 2), width=64):
        draw = torch.Generator().manual_seed(1)
        rotations = torch.linalg.qr(torch.randn(3, width, width, generator=draw)).Q
        self.names = [str(row) for row in rows]
        self.curvature = (rotations @ torch.logspace(-4, 0, width).diag() @ rotations.mT)[list(rows)]
        self.root = (rotations @ torch.logspace(-2, 0, width).diag())[list(rows)]
        self.optimum = torch.randn(3, width, generator=draw)[list(rows)]

    def fit(self, kill_at=None, **more):
        """With 700 steps, the last 475 of them whitened."""

        def gradient(running, values, step):
            if step == kill_at:
                raise KilledError
            noise = 0.03 * torch.randn(values.shape[1], generator=torch.Generator().manual_seed(step))
            away = values - self.optimum[running.index]
            each = zip(running.rows, away, strict=True)
            return torch.stack([self.curvature[row] @ x + self.root[row] @ noise for row, x in each])

        def validate(running, values):
            away = values - self.optimum[running.index]
            return torch.einsum("ri,rij,rj->r", away, self.curvature[running.index], away) / 2 + 0.01

        settings = OptimalFit(first_round=75, max_steps=700, tolerance=1e-4)
        start = torch.zeros_like(self.optimum)
        return descend(start, torch.ones(1, 1), gradient, validate, settings, names=self.names, key="rate", **more)


def test_coupled_coordinates_come_nearer_to_the_optimum():
    """In as many steps; blocks of one coordinate are about Adam."""
    adam, whitened, single = (
        (Coupled().fit(blocks=blocks).best_loss - 0.01).mean() for blocks in ((), (64,), (1,) * 64)
    )
    assert whitened < 0.8 * adam < single


def test_a_fit_has_the_same_bits_beside_others():
    together = Coupled().fit(blocks=(40, 24))
    for row in range(3):
        assert torch.equal(Coupled(rows=(row,)).fit(blocks=(40, 24)).best[0], together.best[row])


@pytest.mark.parametrize("at", [20, 170, 290, 430])
def test_killed_within_a_round_it_goes_on_to_the_same_bits(tmp_path, monkeypatch, at):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0)
    whole, path = Coupled().fit(blocks=(40, 24)), tmp_path / "checkpoint.safetensors"
    with pytest.raises(KilledError):
        Coupled().fit(kill_at=at, blocks=(40, 24), resumable=Resumable(path, "a"))
    assert Resumable(path, "a").load()["moments_40"].shape == (3, 1, 40, 40)
    resumed = Coupled().fit(blocks=(40, 24), resumable=Resumable(path, "a"))
    assert torch.equal(resumed.best, whole.best) and torch.equal(resumed.left, whole.left)


def test_what_is_left_is_not_judged_by_rounds_of_adam():
    """The first whitened round gains more than Adam's last: that is no sign of ever larger gains."""
    problem = Coupled()
    fit = problem.fit(blocks=(64,))
    assert fit.curve_steps.tolist() == [0, 75, 225, 700], "one whitened round"
    gain = fit.curve_losses[-2] - fit.curve_losses[-1]
    rounds = math.log(700 / 225) / math.log(525 / 225)  # of the usual length
    assert torch.allclose(fit.left, gain / rounds) and (gain > 0).all(), "as much again, as after a first round"


@pytest.mark.parametrize("blocks", [(), (4,)])
def test_a_round_s_gain_is_judged_by_the_one_before_but_for_the_first_whitened_one(blocks):
    losses = iter([1.0, 0.8, 0.65, 0.54])
    settings = OptimalFit(first_round=75, max_steps=700, tolerance=1e-4)
    fit = descend(
        torch.zeros(1, 4), torch.ones(1, 1), lambda running, values, step: torch.zeros_like(values),
        lambda running, values: torch.tensor([next(losses)]), settings, names=["a"], key="rate", blocks=blocks,
    )  # fmt: skip
    gain = 0.11 / (math.log(700 / 225) / math.log(525 / 225))
    shrink = 0.5 if blocks else gain / 0.15
    assert shrink != 0.5 or blocks
    assert fit.left.item() == pytest.approx(gain * shrink / (1 - shrink), rel=1e-4)
