"""Faithfulness against the slow way, numpy's decompositions and plain formulas; the model beside itself is perfectly
faithful.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import FAMILIES, random_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oacore.engine.clean import Batch
from oacore.engine.forward import last_residual_from, logits_of, residual_after
from oacore.lenses.affine import AffineLens
from oacore.lenses.constant import OptimalConstants
from oacore.lenses.faithfulness import (
    SMALLEST_CHANGE,
    Continuation,
    Reactions,
    Whitening,
    _Layer,
    aitchison_similarity,
    faithfulness_table,
    lens_jacobian,
    project_out,
    random_directions,
    resample_subspace,
    singular_directions,
    steer,
)
from oacore.lenses.logit import LogitLens
from oacore.metrics import RESOLUTION, kl_divergence
from oacore.models.load import canonical


def some_batch(n=4, length=9):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([length, length - 2, length - 1, length - 3])[:n]
    return Batch(torch.randint(1, 97, (n, length), generator=draw), lengths)


@dataclass
class Affine:
    """A stub: the prediction is an affine map of the residual, the logits are it."""

    matrix: Tensor
    name: str = "tuned"
    init: str = ""

    def final(self, residual, layer):
        return residual @ self.matrix

    def logits(self, residual, layer):
        return self.final(residual, layer)


@dataclass
class Itself:
    """The model as a lens on its own residuals."""

    continuation: Continuation
    name: str = "oca"
    init: str = ""

    def final(self, residual, layer):
        return residual * 1.0

    def logits(self, residual, layer):
        x = residual if residual.dim() == 3 else residual[None]
        found = self.continuation.logits(x, layer)
        return found if residual.dim() == 3 else found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_reaction_is_that_of_all_positions_run_anew(name):
    model, batch, draw = canonical(random_hf(name)), some_batch(), torch.Generator().manual_seed(1)
    continuation, rows = Continuation(model, batch), torch.arange(4)
    for layer in range(3):
        changed = continuation.entering[layer] + torch.randn(2, 4, model.d_model, generator=draw)
        found = continuation.logits(changed, layer)
        for one, logits in zip(changed, found, strict=True):
            residual = residual_after(model, batch.tokens, layer)
            residual[rows, batch.lengths - 1] = one
            expected = logits_of(model, last_residual_from(model, layer, residual, batch.lengths - 1))
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
        unchanged = continuation.logits(continuation.entering[layer][None], layer)[0]
        assert torch.allclose(unchanged, logits_of(model, continuation.entering[-1]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def rows():
    """Correlated rows [300, 6] of unequal variances."""
    draw = torch.Generator().manual_seed(2)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0] * torch.linspace(1, 3, 6)
    return torch.randn(300, 6, generator=draw) @ axes.T + torch.randn(6, generator=draw)


def test_whitened_rows_have_unit_covariance(rows):
    whitening = Whitening.of(rows)
    white = (rows.double() - whitening.mean) @ whitening.inverse
    assert torch.allclose(white.T @ white / 300, torch.eye(6, dtype=torch.float64), atol=2e-3)  # but for the ridge
    assert torch.allclose(whitening.factor @ whitening.inverse, torch.eye(6, dtype=torch.float64), atol=1e-9)


def test_projection_takes_one_whitened_component_from_each_row(rows):
    whitening, directions = Whitening.of(rows), random_directions(3, 6, torch.Generator().manual_seed(3))
    found = project_out(rows[:5].double(), whitening, directions)
    before = (rows[:5].double() - whitening.mean) @ whitening.inverse
    for changed, v in zip(found, directions, strict=True):
        after = (changed - whitening.mean) @ whitening.inverse
        assert torch.allclose(after, before - (before @ v)[:, None] * v, atol=1e-9)
    alone = project_out(rows[3:4].double(), whitening, directions)
    assert torch.allclose(alone[:, 0], found[:, 3]), "a row's change does not depend on the others"


def test_resampling_everything_is_the_other_prompt(rows):
    whitening, x = Whitening.of(rows), rows[:4].double()
    partners = torch.tensor([[1, 2, 3, 0]])
    assert torch.allclose(
        resample_subspace(x, whitening, torch.eye(6, dtype=torch.float64), partners)[0], x[partners[0]], atol=1e-9
    )
    v = random_directions(1, 6, torch.Generator().manual_seed(0))
    white = (resample_subspace(x, whitening, v, partners)[0] - whitening.mean) @ whitening.inverse
    before = (x - whitening.mean) @ whitening.inverse
    assert torch.allclose(white @ v[0], before[partners[0]] @ v[0]) and torch.allclose(
        white - (white @ v.T) * v, before - (before @ v.T) * v
    )


def test_singular_directions_are_those_that_move_the_prediction_most(rows):
    """Of a map whose true directions are planted, and by numpy; the other factor of the decomposition would fail."""
    whitening, draw = Whitening.of(rows), np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.standard_normal((6, 6)))[0] for _ in range(2))
    strengths = np.array([8.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    matrix = torch.from_numpy(np.linalg.inv(whitening.factor.numpy()) @ (left * strengths) @ right.T)
    lens = Affine(matrix)
    assert torch.allclose(lens_jacobian(lens, rows[:7].double(), 0), matrix, atol=1e-9)
    found = singular_directions(lens, whitening, rows.double(), 0).numpy()
    assert np.allclose(np.abs(found @ left), np.eye(6), atol=1e-6)
    assert not np.allclose(np.abs(found @ right), np.eye(6), atol=0.3)
    moved = [np.linalg.norm((v @ whitening.factor.numpy()) @ matrix.numpy()) for v in found]
    assert np.allclose(moved, strengths)


def test_jacobian_of_a_real_lens_by_finite_differences():
    model = canonical(random_hf("gpt2").double())
    lens = OptimalConstants(
        "oca",
        "",
        model,
        {"constants": torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)},
    )
    x, v = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.ones(32, dtype=torch.float64),
    )
    slope = (lens.final(x + 1e-6 * v, 1) - lens.final(x - 1e-6 * v, 1)).mean(0) / 2e-6
    assert torch.allclose(v @ lens_jacobian(lens, x, 1), slope, rtol=1e-5, atol=1e-7)
    assert torch.equal(lens_jacobian(LogitLens("logit", "", model, {}), x, 1), torch.eye(32, dtype=torch.float64))


def test_steering_reaches_the_target():
    model = canonical(random_hf("gpt2"))
    continuation = Continuation(model, some_batch())
    train = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    here = _Layer(continuation, 1, train, 2)
    directions, amounts = (
        random_directions(3, 32, torch.Generator().manual_seed(1)),
        torch.randn(3, 4, dtype=torch.float64),
    )

    def move(scale):
        return steer(here.residual, here.whitening, directions, scale * amounts)

    for target in (0.01, 0.1):
        after = continuation.logits(move(here.magnitude(move, target)), 1).log_softmax(-1)
        assert float(kl_divergence(here.before, after).mean()) == pytest.approx(target, rel=0.02)


logits = st.lists(st.floats(-8, 8), min_size=5, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=200, deadline=None)
@given(logits, logits, logits, logits, st.floats(-50, 50))
def test_aitchison_similarity(before, after, other_before, other_after, shift):
    found = aitchison_similarity(before, after, other_before, other_after)
    assert -1 <= found <= 1
    shifted = aitchison_similarity(before + shift, after - shift, other_before + 2 * shift, other_after)
    # By the definition: w-weighted inner product of log-ratios to w-weighted geometric means.
    w = before.exp() / before.exp().sum()

    def change(a, b):
        ratio = (b.softmax(0) / a.softmax(0)).double()
        return (ratio / (ratio.log() * w).sum().exp()).log()

    one, two = change(before, after), change(other_before, other_after)
    size = ((w * one**2).sum() * (w * two**2).sum()) ** 0.5
    if size > 1e-5 and min((w * one**2).sum(), (w * two**2).sum()) > 2 * SMALLEST_CHANGE**2:
        assert shifted == pytest.approx(float(found), abs=1e-6)
        assert found == pytest.approx(float((w * one * two).sum() / size), abs=1e-6)
        assert aitchison_similarity(before, after, other_after, other_before) == pytest.approx(-float(found), abs=1e-9)
    if (w * one**2).sum() > 1e-6:
        assert aitchison_similarity(before, after, before, after) == pytest.approx(1, abs=1e-9)


def test_no_change_is_like_no_change_and_unlike_any():
    x = torch.tensor([1.0, 2.0, 0.0])
    assert aitchison_similarity(x, x, x, x) == 1 and aitchison_similarity(x, x, x, x * 2) == 0


def table_of(model, lenses, seed=0, tokens_per_batch=16384, **options):
    train = torch.stack([Continuation(model, some_batch()).entering[layer].repeat(20, 1) for layer in range(3)], 1)
    train = train + torch.randn(train.shape, generator=torch.Generator().manual_seed(5))
    sizes = {"n_directions": 4, "resample_sizes": (2, 100)} | options
    return faithfulness_table(
        model, lenses, some_batch(), train, [0, 2], seed=seed, tokens_per_batch=tokens_per_batch, **sizes
    )


def test_the_model_is_faithful_to_itself():
    model = canonical(random_hf("llama"))
    table = table_of(model, [Itself(Continuation(model, some_batch()))])
    assert len(table) == 2 * 6 and set(table["perturbation"]) == {
        "project_random", "steer_random", "project_singular", "steer_singular", "resample_2", "resample_32",
    }  # fmt: skip
    for measure in ("similarity", "correlation", "direction_correlation"):
        assert (table[measure] > 0.999).all()
    assert (table["n"] == 16).all() and not table.isna().any().any()


def test_table_is_complete_and_seeded_and_does_not_depend_on_parts():
    model, draw = canonical(random_hf("gpt2")), torch.Generator().manual_seed(1)
    oca = OptimalConstants("oca", "", model, {"constants": torch.randn(3, 3, 32, generator=draw) * 0.1})
    tuned = AffineLens(
        "tuned", "identity", model, {"matrix": torch.randn(3, 32, 32, generator=draw) * 0.1, "bias": torch.zeros(3, 32)}
    )
    table = table_of(model, [oca, tuned])
    assert len(table) == 2 * 2 * 6
    for measure, low, high in (("similarity", -1, 1), ("correlation", -1, 1), ("direction_correlation", -1, 1)):
        assert table[measure].between(low, high).all()
        assert (table[f"{measure}_low"] <= table[measure] + 1e-9).all() and (
            table[f"{measure}_high"] >= table[measure] - 1e-9
        ).all()
    assert table.equals(table_of(model, [oca, tuned]))
    assert not table.equals(table_of(model, [oca, tuned], seed=1))
    for measure in ("similarity", "correlation"):
        assert np.allclose(table[measure], table_of(model, [oca, tuned], tokens_per_batch=40)[measure], atol=1e-3)


def test_intervals_by_hand():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((40, 3))
    y, counted = 0.5 * x + draw.standard_normal((40, 3)), draw.random((40, 3)) < 0.8
    every = np.ones((40, 3), bool)
    row = Reactions(np.tanh(x), x, y, counted).row(0)
    assert row["similarity"] == pytest.approx(np.tanh(x)[counted].mean()) and row["n"] == counted.sum()
    assert row["correlation"] == pytest.approx(np.corrcoef(x[counted], y[counted])[0, 1])
    row = Reactions(np.tanh(x), x, y, every).row(0)
    assert row["direction_correlation"] == pytest.approx(np.corrcoef(x.mean(1), y.mean(1))[0, 1])
    still = Reactions(x, np.full((40, 3), np.log(RESOLUTION)), y, every).row(0)  # everything below the resolution
    assert np.isnan(still["correlation"]) and np.isnan(still["correlation_low"]), (
        "what never moves correlates with nothing"
    )
    assert np.isnan(Reactions(x, x, y, ~every).row(0)["similarity"])


def test_intervals_are_over_perturbations_and_prompts():
    """Each has a part of its own in the similarity: intervals hold the true mean in 95 of 100 experiments, or a little
    more often, and those over perturbations alone would be far too narrow.
    """
    draw = np.random.default_rng(0)
    P, B, held, widths = 30, 20, 0, []
    for seed in range(200):
        similarity = 0.3 * draw.standard_normal((P, 1)) + 0.3 * draw.standard_normal(B)
        similarity = similarity + 0.3 * draw.standard_normal((P, B))
        row = Reactions(similarity, similarity, similarity, np.ones((P, B), bool)).row(seed)
        held += row["similarity_low"] <= 0 <= row["similarity_high"]
        widths.append(row["similarity_high"] - row["similarity_low"])
    assert 183 <= held <= 199, held
    over_perturbations = 2 * 1.96 * (0.09 / P + 0.09 / P / B) ** 0.5
    assert np.mean(widths) > 1.4 * over_perturbations


def test_prompts_that_a_perturbation_leaves_alone_do_not_count():
    """At layer 0 the residual is the last token's embedding: two prompts that end alike are each other's partner
    without a change.
    """
    model, batch = canonical(random_hf("llama")), some_batch()
    batch.tokens[torch.arange(4), batch.lengths - 1] = torch.tensor([5, 5, 6, 6])
    train = torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(5))
    lens = LogitLens("logit", "", model, {})
    table = faithfulness_table(model, [lens], batch, train, [0], n_directions=6, resample_sizes=(32,)).set_index(
        "perturbation"
    )
    assert 0 < table.loc["resample_32", "n"] < 24 and table.loc["project_random", "n"] == 24
