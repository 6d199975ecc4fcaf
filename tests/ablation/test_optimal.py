"""Fits of optimal constants: a case with a known optimum, convergence, resumption, independence of batching."""

from dataclasses import replace

import pytest
import torch
from conftest import random_hf

from oacore.ablation.components import Component, components_of, width
from oacore.ablation.optimal import (
    better_start,
    fit_constants,
    gradients,
    load_constants,
    mean_losses,
    save_constants,
    starting_means,
)
from oacore.config.base import OptimalFit
from oacore.draws import prompts_of_step
from oacore.engine.activations import _add_sources
from oacore.engine.clean import Batch, clean_log_probs, clean_pass
from oacore.engine.statistics import Moments, Statistics
from oacore.errors import UserError
from oacore.fits.curves import read_curves
from oacore.fits.resume import Resumable
from oacore.models.load import canonical
from oacore.store.provenance import Provenance

LIMIT = 4096


def statistics_of(model, prompts):
    moments = Moments(int(prompts.lengths.min()))
    clean = clean_pass(model, prompts.tokens, prompts.lengths)
    _add_sources(moments, clean, prompts.lengths)
    shapes = {"head": (model.n_layers, model.n_heads, model.d_head), "mlp": (model.n_layers, model.d_model)}
    positional = {kind: moments.positional(kind, shape) for kind, shape in shapes.items()}
    return Statistics(
        moments.shortest,
        {kind: moments.mean(f"{kind}/mean", shape) for kind, shape in shapes.items()},
        {kind: moments.std(kind, shape) for kind, shape in shapes.items()},
        positional,
        positional,
    )


def random_prompts(n, n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (n, n_tokens), generator=generator)
    return Batch(tokens, torch.randint(3, n_tokens + 1, (n,), generator=generator))


@pytest.fixture(scope="module")
def setting():
    model = canonical(random_hf("gpt2", scale=0.5))
    train, validation = random_prompts(48, 7, 0), random_prompts(24, 7, 0)  # same seed: half of the training prompts
    return model, statistics_of(model, train), train, validation


def run(setting, components, settings, **options):
    model, statistics, train, validation = setting
    start = starting_means(model, components, statistics, positional=options.pop("positional", False))
    options = {"tokens_per_batch": LIMIT, "start": start, **options}
    return fit_constants(model, components, statistics, train, validation, settings, **options)


def test_known_optimum():
    """Where the ablated model predicts the same on every prompt, the best it can predict is the mean of the clean
    predictions.

    One layer, prompts that share their last token, no MLP: with its only head replaced by a constant, nothing about the
    prompt reaches the last position. E KL(p_x || q) is least at q = E p_x, and with three tokens and a head of width 8
    every q can be reached.
    """
    import transformers as tf

    torch.manual_seed(0)
    hf = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for part in (hf.transformer.h[0].mlp.c_proj.weight, hf.transformer.h[0].mlp.c_proj.bias):
            part.zero_()
    model = canonical(hf)
    tokens = torch.cartesian_prod(*(torch.arange(3) for _ in range(4)))
    tokens = torch.cat((tokens, torch.ones(len(tokens), 1, dtype=torch.long)), 1)  # [81, 5]
    prompts = Batch(tokens, torch.full((81,), 5))
    p = clean_log_probs(model, clean_pass(model, prompts.tokens, prompts.lengths)).double()
    q = p.exp().mean(0).log()
    least = (p.exp() * (p - q)).sum(-1).mean().item()
    statistics = statistics_of(model, prompts)
    head = [Component(0, "head", 0)]
    start = starting_means(model, head, statistics, positional=False)
    at_mean = mean_losses(model, prompts, head, start, LIMIT).item()
    settings = OptimalFit(batch_size=81, max_steps=3150, tolerance=1e-3)
    found = fit_constants(model, head, statistics, prompts, prompts, settings, start=start, tokens_per_batch=LIMIT)
    assert found.converged.all()
    assert at_mean > 1.05 * least, "the mean must not be the answer already"
    assert found.best_loss.item() == pytest.approx(least, rel=1e-3)


def test_fit_improves_on_its_start_and_records_how(setting):
    model, statistics, _, validation = setting
    components = components_of(model, ("head", "mlp"))
    settings = OptimalFit(batch_size=16, first_round=10, max_steps=30)
    found = run(setting, components, settings)
    start = starting_means(model, components, statistics, positional=False)
    before = mean_losses(model, validation, components, start, LIMIT)
    assert torch.allclose(found.curve_losses[0], before, rtol=1e-4, atol=1e-6), "the curve starts at the start"
    assert (found.best_loss <= before).all()
    assert (found.best_loss < before).float().mean() > 0.7
    assert found.best_loss.sum() < 0.98 * before.sum(), (
        "a random model is nearly linear: its means are nearly optimal already"
    )
    again = mean_losses(model, validation, components, found.best, LIMIT)
    assert torch.allclose(again, found.best_loss, rtol=1e-4, atol=1e-6), (
        "the gap reported is that of the constants kept"
    )
    assert found.curve_steps.tolist() == sorted(set(found.curve_steps.tolist()))


def test_stops_by_its_own_test(setting):
    components = components_of(setting[0], ("mlp",))
    found = run(
        setting,
        components,
        OptimalFit(batch_size=48, first_round=20, max_steps=1260, tolerance=0.05),
    )
    assert found.converged.any()
    assert (found.n_steps[found.converged] < 1260).any() and (found.n_steps[~found.converged] == 1260).all()
    capped = run(setting, components, OptimalFit(batch_size=48, max_steps=5))
    assert not capped.converged.any()
    assert (capped.n_steps == 5).all()


def test_positional_fit_is_at_least_as_good(setting):
    model, statistics, _, validation = setting
    components = components_of(model, ("head", "mlp"))
    settings = OptimalFit(batch_size=16, first_round=10, max_steps=30)
    constant = run(setting, components, settings)
    start = starting_means(model, components, statistics, positional=True)
    best = better_start(model, validation, components, start, constant.best, LIMIT)
    positional = run(setting, components, settings, start=best)
    assert positional.best.shape[1] == statistics.shortest + 1
    assert (positional.best_loss <= constant.best_loss + 1e-6).all()


def test_components_do_not_influence_each_other(setting):
    components = components_of(setting[0], ("head", "mlp"))
    settings = OptimalFit(batch_size=16, max_steps=20)
    together = run(setting, components, settings)
    alone = run(setting, components[4:5], settings)
    w = width(setting[0], components[4].kind)
    assert torch.allclose(together.best[4, :, :w], alone.best[0, :, :w], rtol=1e-3, atol=1e-4)


def test_micro_batches_change_nothing(setting):
    model, statistics, train, validation = setting
    components = components_of(model, ("head", "attention_layer", "mlp"))
    start = starting_means(model, components, statistics, positional=True)
    for function, prompts in ((gradients, train), (mean_losses, validation)):
        whole = function(model, prompts, components, start, 10**6)
        pieces = function(model, prompts, components, start, 64)
        assert torch.allclose(whole, pieces, rtol=1e-3, atol=1e-6)


def test_same_seed_same_bits(setting):
    components = components_of(setting[0], ("mlp",))
    settings = OptimalFit(batch_size=8, max_steps=20)
    first, second, other = (run(setting, components, settings, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.best, second.best)
    assert not torch.equal(first.best, other.best)


class KilledError(Exception):
    """Stands for a killed job."""


def test_a_killed_fit_resumes_bit_by_bit(setting, tmp_path, monkeypatch):
    components = components_of(setting[0], ("head", "mlp"))
    settings = OptimalFit(batch_size=8, first_round=10, max_steps=70)
    straight = run(setting, components, settings)
    checkpoint = tmp_path / "fit.safetensors"
    from oacore.fits import descent

    adam, calls = descent._adam, []

    def killed_later(*arguments):
        calls.append(None)
        if len(calls) == 37:
            raise KilledError
        adam(*arguments)

    monkeypatch.setattr(descent, "_adam", killed_later)
    with pytest.raises(KilledError):
        run(setting, components, settings, resumable=Resumable(checkpoint, "a"))
    monkeypatch.setattr(descent, "_adam", adam)
    resumed = run(setting, components, settings, resumable=Resumable(checkpoint, "a"))
    for name in ("best", "best_loss", "left", "n_steps", "converged", "curve_steps", "curve_losses"):
        assert torch.equal(getattr(straight, name), getattr(resumed, name)), name
    other = run(setting, components, replace_steps(settings, 10), resumable=Resumable(checkpoint, "b"))
    assert (other.n_steps == 10).all(), "a checkpoint of another fit is not taken up"


def replace_steps(settings, n):
    return settings.model_copy(update={"max_steps": n})


def test_nan_is_an_error_that_names_the_component(setting):
    model, statistics, train, validation = setting
    broken = replace(
        model, blocks=(*model.blocks[:2], replace(model.blocks[2], W_out=model.blocks[2].W_out * float("nan")))
    )
    with pytest.raises(
        UserError,
        match=r"step 0: not finite: validation loss of m0, m1, m2; last good checkpoint: none; allowed: a smaller abl",
    ):
        run(
            (broken, statistics, train, validation),
            components_of(model, ("mlp",)),
            OptimalFit(max_steps=10),
        )


def test_epochs_use_every_prompt_once():
    for epoch in range(3):
        seen = torch.cat([prompts_of_step(20, 5, seed=1, step=epoch * 4 + i) for i in range(4)])
        assert sorted(seen.tolist()) == list(range(20))
    assert not torch.equal(prompts_of_step(20, 5, 1, 0), prompts_of_step(20, 5, 1, 4))


def test_constants_on_disk(setting, tmp_path):
    model = setting[0]
    components = components_of(model, ("head", "mlp"))
    found = run(setting, components, OptimalFit(batch_size=8, max_steps=10))
    path = tmp_path / "constants.safetensors"
    save_constants(path, model, components, found, Provenance({"model_hash": "m", "task": "ioi"}))
    loaded = load_constants(path, components, Provenance({"model_hash": "m"}))
    assert torch.equal(loaded, found.best)
    some = load_constants(path, components[1:3], Provenance())
    assert torch.equal(some, found.best[1:3, :, : model.d_head])
    with pytest.raises(UserError, match=r"model_hash is 'm', expected 'other'"):
        load_constants(path, components, Provenance({"model_hash": "other"}))
    with pytest.raises(UserError, match=r"nothing fitted for a9\.h9"):
        load_constants(path, [Component(9, "head", 9)], Provenance())
    curves = read_curves(path, Provenance({"model_hash": "m"}))
    assert set(curves) == {"step", "fit", "validation_loss"}
    assert curves["step"].max() == 10
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=str(path)):
        load_constants(path, components, Provenance())
