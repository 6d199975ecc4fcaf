"""What is measured of each method: estimates and passes against second ways of getting them, planted slopes."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_hf

from oacore.ablation import gaps, optimal
from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import components_of, group_components, rows_in, value_of
from oacore.ablation.optimal import fit_constants, starting_means
from oacore.circuits.passes import logit_difference
from oacore.config.base import OptimalFit
from oacore.config.study import ESTIMATORS
from oacore.engine.activations import _add_sources
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.statistics import Moments, Statistics
from oacore.metrics import GRADIENT
from oacore.models.load import canonical
from oacore.study import estimates
from oacore.study.attribution import attributions
from oacore.study.effort import Effort, Sizes, fit_passes, whole, within
from oacore.study.estimates import Bench
from oacore.study.exponents import exponents, payoff, slope
from oacore.study.quality import quality

FIT = OptimalFit(batch_size=6, first_round=3, max_steps=9)
LIMIT = 60  # tokens: batches of some prompts, and some components side by side


def random_prompts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (n, 6), generator=generator)
    return Batch(tokens, torch.randint(3, 7, (n,), generator=generator))


def bench_of(name, dtype=torch.float32):
    hf = random_hf(name, scale=0.3).to(dtype)
    model = canonical(hf)
    train = random_prompts(20, 0)
    moments = Moments(int(train.lengths.min()))
    _add_sources(moments, clean_pass(model, train.tokens, train.lengths), train.lengths)
    shapes = {"head": (model.n_layers, model.n_heads, model.d_head), "mlp": (model.n_layers, model.d_model)}
    mean, std = (
        {kind: moment(kind, shape).to(dtype) for kind, shape in shapes.items()}
        for moment in (lambda kind, shape: moments.mean(f"{kind}/mean", shape), moments.std)
    )
    statistics = Statistics(moments.shortest, mean, std, mean, mean)
    test, ids = random_prompts(10, 2), torch.arange(10)[:, None]
    wrong = torch.cat((ids + 20, ids + 40), 1)
    wrong[3, 1] = -1
    parts = components_of(model, ["head", "attention_layer", "mlp"])
    others = Batch(random_prompts(10, 3).tokens, test.lengths)
    return Bench(model, parts, statistics, train, random_prompts(8, 1), test, others, ids, wrong, FIT, LIMIT)


@pytest.fixture(scope="module")
def bench():
    return bench_of("gpt2")


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama"])
def test_attribution_is_the_slope_of_mean_ablation(family):
    """Central differences in float64: a step of each component's value towards its mean."""
    bench = bench_of(family, torch.float64)
    model, batch, step = bench.model, bench.test, 1e-5
    found = attributions(model, bench.components, bench.statistics, batch, bench.answers, bench.wrong)
    clean, expected = clean_pass(model, batch.tokens, batch.lengths), []
    for group in group_components(bench.components):
        value, mean = value_of(clean, group), rows_in(bench.statistics.mean, group)[:, None, None]
        high, low = (
            logit_difference(
                ablated_logits(model, clean, group, value + sign * step * (mean - value)).flatten(0, 1),
                bench.answers.repeat(len(group), 1),
                bench.wrong.repeat(len(group), 1),
            )
            for sign in (1, -1)
        )
        expected.append(((low - high) / (2 * step)).unflatten(0, (len(group), -1)))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-7)
    assert found.abs().max() > 1e-3


def test_the_reference_is_the_pipeline_s_own_gap(bench):
    effort = whole(FIT, bench.sizes)
    found = ESTIMATORS["optimal"].load()(bench, ESTIMATORS["optimal"], effort, 5)
    start = starting_means(bench.model, bench.components, bench.statistics, positional=False)
    fitted = fit_constants(
        bench.model, bench.components, bench.statistics, bench.train, bench.validation, FIT, start=start, seed=5,
        tokens_per_batch=LIMIT,
    )  # fmt: skip
    given = (["optimal"], bench.statistics, {"optimal": fitted.best}, bench.test, bench.counterfactual)
    expected = gaps.evaluate(bench.model, bench.components, *given, tokens_per_batch=LIMIT)["optimal"]
    assert torch.equal(found.values, expected)
    assert found.fit.steps == 9 and found.fit.left == pytest.approx(float(fitted.left.sum()))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_passes_are_those_that_ran(bench, name, monkeypatch):
    """Rows of clean passes, of ablated ones and of gradients, counted where they are computed."""
    ran = {"forward": 0, "backward": 0}

    def counting(module, function, rows):
        inner = getattr(module, function)

        def counted(*given, **named):
            n = rows(*given)
            ran["forward"] += n
            ran["backward"] += n * (function == "attributions" or (function == "_losses" and torch.is_grad_enabled()))
            return inner(*given, **named)

        monkeypatch.setattr(module, function, counted)

    for module in (gaps, optimal):
        counting(module, "clean_pass", lambda model, tokens, lengths: len(tokens))
    counting(gaps, "ablated_logits", lambda model, clean, group, values: len(group) * len(clean.last))
    counting(optimal, "_losses", lambda model, clean, target, group, constants: len(group) * len(clean.last))
    counting(estimates, "attributions", lambda model, components, statistics, batch, *ids: len(batch))
    found = ESTIMATORS[name].load()(bench, ESTIMATORS[name], Effort(7, 4, 5, 3), 0)
    assert ran == {"forward": found.passes.forward, "backward": found.passes.backward}
    assert found.values.shape == (len(bench.components), 7) and found.values.isfinite().all()


@pytest.mark.parametrize("budget", [1, 2, 17, 64, 300, 5000])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_is_over_its_budget(name, budget):
    row, sizes = ESTIMATORS[name], Sizes(n_components=9, n_validation=50, n_test=100)
    effort = within(budget, row, sizes, FIT)
    if effort is None:
        assert budget < (32 if row.fitted else 2)
        return
    assert 2 <= effort.n_prompts <= sizes.n_test and effort.max_steps <= FIT.max_steps
    if row.gradient:
        assert GRADIENT * effort.n_prompts <= budget * sizes.n_components
    else:
        assert effort.n_prompts + (fit_passes(effort, FIT) if row.fitted else 0) <= budget
    if row.fitted:
        assert fit_passes(effort, FIT) <= budget // 2
        longer = effort._replace(max_steps=effort.max_steps + 1)
        assert effort.max_steps == FIT.max_steps or fit_passes(longer, FIT) > budget // 2


def test_quality_of_what_is_known():
    reference = np.random.default_rng(0).uniform(0.5, 1, (6, 40)) * np.arange(1, 7)[:, None]
    clusters = np.arange(40)
    same = quality(reference, reference, clusters, 0)
    assert same.spearman == pytest.approx(1) and same.spearman_se < 0.1 and same.excess == 0 == same.excess_se
    few = quality(1.5 * reference[:, :30], reference, clusters, 0)
    assert few.excess == pytest.approx(0.5) and few.excess_se == pytest.approx(0, abs=1e-12)
    assert quality(-reference[::-1], reference, clusters, 0).spearman == pytest.approx(-1), "the size counts"
    alone = quality(reference, reference, np.zeros(40, int), 0)
    assert alone.spearman_se == 0, "one cluster is drawn every time"


def table(exponent):
    """Costs of four sizes, exactly on a line."""
    n_weights = np.array([1e5, 3e5, 1e6, 4e6])
    return pd.DataFrame(
        {
            "model": list("abcd"), "task": "ioi", "method": "mean", "n_weights": n_weights,
            "seconds": 1e-4 * n_weights**exponent, "forward_passes": 10, "backward_passes": 5,
        }
    )  # fmt: skip


def test_exponents_of_planted_costs():
    found = exponents(pd.concat([table(0.8), table(1.3).assign(method="optimal")], ignore_index=True))
    by_name = found.set_index(["method", "quantity"])
    assert by_name.loc[("mean", "seconds"), "exponent"] == pytest.approx(0.8)
    assert by_name.loc[("optimal", "seconds"), "exponent"] == pytest.approx(1.3)
    assert by_name.loc[("optimal", "seconds"), "se"] < 1e-12
    assert by_name.loc[("mean", "passes x weights"), "exponent"] == pytest.approx(1), "as many passes at every size"
    none = pd.array([pd.NA] * 4, dtype="Int64")
    uncounted = exponents(table(0.5).assign(forward_passes=none, backward_passes=none))
    assert list(uncounted["quantity"]) == ["seconds"]


def test_slopes_and_their_errors_are_those_of_numpy():
    x, noise = np.linspace(0, 2, 9), np.random.default_rng(1).normal(size=9)
    (expected, _), covariance = np.polyfit(x, 0.7 * x + noise, 1, cov=True)
    found, se = slope(x, 0.7 * x + noise)
    assert found == pytest.approx(expected) and se == pytest.approx(covariance[0, 0] ** 0.5)
    assert np.isnan(slope(x[:1], x[:1])).all() and np.isnan(slope(x[:2], x[:2])[1])


def test_payoff_is_where_optimal_stays_ahead():
    rows = []
    for budget, ahead in {4: 0.2, 16: -0.1, 64: 0.3, 256: 0.1}.items():
        rows += [("optimal", budget, 0.5 + ahead), ("mean", budget, 0.5), ("zero", budget, 0.7)]
    accuracy = pd.DataFrame(rows, columns=["method", "budget", "spearman"]).assign(model="a", n_weights=5, task="ioi")
    accuracy = accuracy[(accuracy["method"] != "optimal") | (accuracy["budget"] > 4)]  # too few for a fit
    found = payoff(accuracy.astype({"budget": "Int64"})).set_index("method")
    assert found.loc["mean", "budget"] == 64 and found.loc["mean", "difference"] == pytest.approx(0.1)
    assert pd.isna(found.loc["zero", "budget"]) and found.loc["zero", "difference"] == pytest.approx(-0.1)
