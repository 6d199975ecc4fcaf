"""Planted recall: a brute-force tracer of one layer at a time finds the layer that looks up, by constants sharply, by
noise less so.
"""

import pytest
import torch

from oacore.engine.forward import add_positions, attention_write, combine_heads, embed_tokens, heads, logits_of, mlp
from planted.recall import N_LAYERS, recall

SEEDS, N_DRAWS, SCALE = range(3), 4, 3


@pytest.fixture(scope="module", params=SEEDS)
def planted(request):
    return recall(request.param, per_subject=2)


def in_subject(planted):
    position = torch.arange(planted.tokens.shape[1])
    return (position >= planted.subject[:, :1]) & (position < planted.subject[:, 1:])  # [N, T]


def moments(planted):
    embedded = embed_tokens(planted.model, planted.tokens)[in_subject(planted)]
    return embedded.mean(0), embedded.std(0)


def run(planted, subject=None, site=None, layer=None, clean=None):
    """Probability of the answers [N] and every (attention, MLP) output; the subject's embeddings and one site's clean
    output put in.
    """
    model, rows, last = planted.model, torch.arange(len(planted.tokens)), planted.lengths - 1
    where = {"attention": last, "mlp": planted.subject[:, 1] - 1}
    embedded = embed_tokens(model, planted.tokens)
    if subject is not None:
        embedded = torch.where(in_subject(planted)[..., None], subject, embedded)
    residual, outs = add_positions(model, embedded), []

    def restore(name, i, out):
        if (name, i) != (site, layer):
            return out
        out = out.clone()
        out[rows, where[name]] = clean[i][name][rows, where[name]]
        return out

    for i in range(model.n_layers):
        attention = restore(
            "attention", i, attention_write(model, i, combine_heads(model, i, heads(model, i, residual)))
        )
        outs.append({"attention": attention, "mlp": restore("mlp", i, mlp(model, i, residual + attention))})
        residual = residual + attention + outs[-1]["mlp"]
    return logits_of(model, residual[rows, last]).softmax(-1)[rows, planted.answers], outs


def traced(planted, subject, site="mlp", layers=range(N_LAYERS)):
    """Mean probability of the answer when corrupted, and the AIE [layers]."""
    clean = run(planted)[1]
    corrupted = run(planted, subject)[0].mean()
    return corrupted, torch.stack([run(planted, subject, site, layer, clean)[0].mean() - corrupted for layer in layers])


def noisy(planted, draw):
    generator = torch.Generator().manual_seed(draw)
    embedded = embed_tokens(planted.model, planted.tokens)
    return embedded + SCALE * moments(planted)[1] * torch.randn(embedded.shape, generator=generator)


@pytest.fixture(scope="module")
def curves(planted):
    """AIE of the MLPs under mean corruption [L], and under draws of noise [draws, L]."""
    return traced(planted, moments(planted)[0])[1], torch.stack(
        [traced(planted, noisy(planted, draw))[1] for draw in range(N_DRAWS)]
    )


def off_peak(curve):
    """Share of the sum of |AIE| outside its largest."""
    return float(1 - curve.abs().max() / curve.abs().sum())


def elsewhere(planted, values):
    """values [..., L] without those of the recall layer."""
    return values[..., torch.arange(N_LAYERS) != planted.recall_layer]


def test_the_model_recalls_every_fact(planted):
    assert run(planted)[0].min() > 0.9


def test_corrupted_subjects_are_not_recalled(planted):
    mean = run(planted, moments(planted)[0])[0].mean()
    noise = torch.stack([run(planted, noisy(planted, draw))[0].mean() for draw in range(N_DRAWS)]).mean()
    assert mean < 0.1 and mean < noise < 0.5


def test_neither_token_alone_determines_the_answer(planted):
    rows = torch.arange(len(planted.tokens))
    first, second = (planted.tokens[rows, planted.subject[:, 0] + i] for i in range(2))
    facts = {(int(a), int(b)): int(c) for a, b, c in zip(first, second, planted.answers, strict=True)}
    assert len(facts) == 36 and len(rows) == 72 and len(set(facts.values())) == 6
    for i in range(2):
        for token in {key[i] for key in facts}:
            assert len({answer for key, answer in facts.items() if key[i] == token}) == 6
    assert len(set(planted.subject[:, 0].tolist())) >= 4 and len(set(planted.lengths.tolist())) >= 4
    assert (planted.tokens[:, 0] == 0).all() and (
        planted.tokens[rows, planted.lengths - 1] == planted.tokens[0, planted.lengths[0] - 1]
    ).all()
    assert (planted.tokens[torch.arange(planted.tokens.shape[1]) >= planted.lengths[:, None]] == 0).all()


def test_a_mean_points_at_the_recall_layer_alone(planted, curves):
    curve, clean = curves[0], run(planted)[0].mean()
    assert curve[planted.recall_layer] > 0.9 * clean
    assert elsewhere(planted, curve).abs().max() < 0.02


def test_noise_points_at_the_recall_layer_too_but_smears(planted, curves):
    mean, noise = curves[0], curves[1].mean(0)
    assert noise.argmax() == planted.recall_layer and noise.max() < 0.5 * mean.max()
    assert off_peak(noise) > 0.1 > 10 * off_peak(mean)


def test_the_smear_is_no_chance_of_the_draws(planted, curves):
    """Restoring some other MLP helps on average: the sum of the AIE of the others is above zero in the mean of the
    draws.
    """
    sums = elsewhere(planted, curves[1]).sum(1)  # [draws]
    assert sums.mean() > max(0.03, 1.5 * float(sums.std()) / N_DRAWS**0.5)


@pytest.mark.parametrize("kind", ["mean", "noise"])
def test_the_mover_brings_it_to_the_last_token(planted, kind):
    subject = moments(planted)[0] if kind == "mean" else noisy(planted, 0)
    corrupted, curve = traced(planted, subject, "attention")
    assert curve.argmax() == planted.mover_layer
    assert corrupted + curve.max() > 0.9
    assert curve.abs().sort().values[:-1].max() < 0.05


def test_without_the_spill_noise_does_not_smear():
    planted, same = recall(0, per_subject=2, spill=0), recall(0, per_subject=2)
    torch.testing.assert_close(run(planted)[0], run(same)[0])  # alarms are silent on clean prompts
    noise = traced(planted, noisy(planted, 0))[1]
    assert off_peak(noise) < 0.05


def test_fitted_constants_point_at_the_recall_layer_alone():
    """One constant per restored layer, by Adam from the mean, as in OAT: for the layer itself and those beside it."""
    planted = recall(1, per_subject=1)
    clean, outs = run(planted)
    mean = moments(planted)[0]
    for layer in range(planted.recall_layer - 1, planted.recall_layer + 2):
        constant = mean.clone().requires_grad_()
        optimiser = torch.optim.Adam([constant], lr=0.05)
        for _ in range(15):
            loss = (clean - run(planted, constant, "mlp", layer, outs)[0]).relu().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        corrupted, (aie,) = traced(planted, constant.detach(), layers=[layer])
        if layer == planted.recall_layer:
            assert aie > 0.9
        # the fit finds all that a constant can do, to say one answer to everybody: it needs no restored MLP for that
        else:
            assert abs(aie) < 0.02 and 0.1 < corrupted < 0.2 and corrupted > 2 * run(planted, mean)[0].mean()


def test_a_seed_fixes_everything_and_seeds_place_the_recall_elsewhere():
    one, again, other = recall(1, per_subject=1), recall(1, per_subject=1), recall(2, per_subject=1)
    assert torch.equal(one.model.W_E, again.model.W_E) and torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.model.W_E, other.model.W_E)
    places = [
        (planted.recall_layer, planted.mover_layer) for planted in (recall(seed, per_subject=1) for seed in range(8))
    ]
    assert len(set(places)) >= 4 and all(3 <= layer < mover < N_LAYERS for layer, mover in places)
