"""Gaps of every method against values put in by hand, and the invariants that must hold exactly."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_hf
from scipy.stats import spearmanr
from test_optimal import random_prompts, statistics_of

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import components_of, group_components, rows_in, value_of
from oacore.ablation.gaps import evaluate, gap_table, summary_table
from oacore.config.ablation import Method
from oacore.draws import derangement
from oacore.engine.clean import Batch, clean_log_probs, clean_pass
from oacore.engine.statistics import Statistics
from oacore.fits.convergence import Convergence
from oacore.metrics import clustered_means_and_ses, kl_divergence
from oacore.models.load import canonical

METHODS: tuple[Method, ...] = Method.__args__
KINDS = ("head", "attention_layer", "mlp")


def counterfactual_of(prompts):
    return Batch((prompts.tokens + 13) % 97, prompts.lengths)


def constants_of(model, components, statistics, seed=0):
    shapes = {"optimal": 1, "optimal_positional": statistics.shortest + 1}
    generator = torch.Generator().manual_seed(seed)
    return {
        method: torch.randn(len(components), rows, model.d_model, generator=generator)
        for method, rows in shapes.items()
    }


@pytest.fixture(scope="module")
def setting():
    model = canonical(random_hf("llama"))
    prompts = random_prompts(9, 8, 2)
    statistics = statistics_of(model, prompts)
    other = counterfactual_of(prompts)
    statistics = replace(statistics, cf_mean=statistics_of(model, other).mean_positional)
    return model, prompts, other, statistics


def gaps_of(model, prompts, other, statistics, methods=METHODS, tokens_per_batch=4096, seed=0):
    components = components_of(model, KINDS)
    constants = constants_of(model, components, statistics)
    return evaluate(
        model, components, methods, statistics, constants, prompts, other, seed=seed, tokens_per_batch=tokens_per_batch
    )


def stream_of(component):
    """Layer, kind and head (0 without one): a component's own, whichever others are measured beside it."""
    kind = ("head", "mlp", "attention_layer").index(component.kind)
    return component.layer, kind, component.head + 1


def by_hand(setting, group, row, method, prompt, constants, seed):
    """The replacement of one component on one prompt, built position by position from its definition."""
    model, prompts, other, statistics = setting
    n_tokens = prompts.tokens.shape[1]
    value = value_of(clean_pass(model, prompts.tokens, prompts.lengths), group)[:, prompt]  # [n, T, w]
    if method == "zero":
        return torch.zeros_like(value)
    if method in ("mean", "optimal"):
        row_of = (
            rows_in(statistics.mean, group)
            if method == "mean"
            else constants[method][row : row + len(group), 0, : value.shape[-1]]
        )
        return row_of[:, None].expand_as(value)
    if method in ("mean_positional", "cf_mean", "optimal_positional"):
        tables = {"mean_positional": statistics.mean_positional, "cf_mean": statistics.cf_mean}
        table = (
            rows_in(tables[method], group)
            if method in tables
            else constants[method][row : row + len(group), :, : value.shape[-1]]
        )
        return torch.stack([table[:, min(t, statistics.shortest)] for t in range(n_tokens)], 1)
    if method == "counterfactual":
        return value_of(clean_pass(model, other.tokens, other.lengths), group)[:, prompt]
    generator = torch.Generator().manual_seed(seed)
    partner = int(derangement(len(prompts), generator)[prompt])
    length = int(prompts.lengths[partner])
    partners = clean_pass(model, prompts.tokens[[partner], :length], prompts.lengths[[partner]])
    donor = value_of(partners, group)[:, 0]
    if method == "resample_positional":
        return torch.stack([donor[:, min(t, length - 1)] for t in range(n_tokens)], 1)
    if method == "resample":
        draws = torch.rand(len(prompts), n_tokens, generator=generator)
        return torch.stack([donor[:, 1 + int(draws[prompt, t] * (length - 1))] for t in range(n_tokens)], 1)
    noise = [
        np.random.default_rng((seed, prompt, *stream_of(item))).standard_normal(value.shape[1:], dtype=np.float32)
        for item in group.components
    ]
    return value + 3 * rows_in(statistics.std, group)[:, None] * torch.from_numpy(np.stack(noise))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_what_its_definition_says(setting, method):
    model, prompts, _, statistics = setting
    gaps = gaps_of(*setting, methods=(method,), seed=4)[method]
    components = components_of(model, KINDS)
    constants = constants_of(model, components, statistics)
    row = 0
    for group in group_components(components):
        for prompt in (0, 5):
            one = Batch(prompts.tokens[[prompt]], prompts.lengths[[prompt]])
            clean = clean_pass(model, one.tokens, one.lengths)
            replacement = by_hand(setting, group, row, method, prompt, constants, 4)[:, None]
            expected = kl_divergence(clean_log_probs(model, clean), ablated_logits(model, clean, group, replacement))[
                :, 0
            ]
            assert torch.allclose(gaps[row : row + len(group), prompt], expected, rtol=1e-3, atol=1e-6), group
        row += len(group)


def test_batches_change_nothing(setting):
    whole, pieces = gaps_of(*setting, tokens_per_batch=10**6), gaps_of(*setting, tokens_per_batch=64)
    for method in METHODS:
        assert torch.allclose(whole[method], pieces[method], rtol=1e-3, atol=1e-6), method


def test_seed_draws_resamples_and_noise_only(setting):
    first, second = gaps_of(*setting, seed=0), gaps_of(*setting, seed=1)
    changed = {method for method in METHODS if not torch.allclose(first[method], second[method], rtol=1e-3, atol=1e-6)}
    assert changed == {"resample", "resample_positional", "gaussian"}


def broken_head(change):
    """A model whose head a1.h2 is changed."""
    model = canonical(random_hf("gpt2"))
    blocks = list(model.blocks)
    blocks[1] = change(blocks[1])
    return replace(model, blocks=tuple(blocks))


def edited(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def head_gaps(model):
    prompts = random_prompts(9, 8, 2)
    gaps = gaps_of(model, prompts, counterfactual_of(prompts), statistics_of(model, prompts))
    row = [component.name for component in components_of(model, KINDS)].index("a1.h2")
    return {method: gaps[method][row].abs().max().item() for method in METHODS}


def test_a_component_that_never_reaches_the_logits_costs_nothing():
    gaps = head_gaps(broken_head(lambda block: replace(block, W_O=edited(block.W_O, 2, 0.0))))
    assert max(gaps.values()) < 1e-6


def test_a_constant_component_costs_nothing_under_its_mean():
    def constant(block):
        return replace(block, W_V=edited(block.W_V, (slice(None), 2), 0.0), b_V=edited(block.b_V, 2, 3.0))

    gaps = head_gaps(broken_head(constant))
    assert max(gaps[method] for method in METHODS if "optimal" not in method and method != "zero") < 1e-6
    assert gaps["zero"] > 1e-4, "zero is not its value"


def test_tables():
    gaps = {
        "optimal": torch.tensor([[1.0, 3.0], [0.0, 0.2], [0.5, 0.5]]),
        "mean": torch.tensor([[4.0, 4.0], [0.0, 0.0], [2.0, 3.0]]),
        "optimal_positional": torch.tensor([[1.0, 1.0], [0.0, 0.1], [0.25, 0.25]]),
        "counterfactual": torch.tensor([[5.0, 5.0], [0.1, 0.2], [7.0, 7.0]]),
    }
    components = components_of(canonical(random_hf("gpt2")), ("head",))[:3]
    table = gap_table(components, gaps, np.arange(2))
    columns = ["component", "kind", "layer", "head", "method", "gap_nats", "se_nats", "n_prompts"]
    assert list(table.columns) == [*columns, "converged", "steps", "left_nats"]
    first = table[(table["component"] == "a0.h0") & (table["method"] == "optimal")].iloc[0]
    assert (first["gap_nats"], first["n_prompts"], first["head"]) == (2.0, 2, 0)
    assert first["se_nats"] == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))
    summary = summary_table(table).set_index("method")
    assert summary.loc["mean", "median_ratio_optimal_to_method"] == pytest.approx(np.median([2 / 4, 0.5 / 2.5]))
    assert summary.loc["mean", "median_ratio_optimal_positional_to_method"] == pytest.approx(
        np.median([1 / 4, 0.25 / 2.5])
    )
    assert summary.loc["optimal", "spearman_with_counterfactual"] == pytest.approx(
        spearmanr([2, 0.1, 0.5], [5, 0.15, 7])[0]
    )
    assert table["converged"].isna().all() and table["steps"].isna().all() and table["left_nats"].isna().all()
    fits = {"optimal": {"a0.h1": Convergence(False, 150, 0.02), "a0.h0": Convergence(True, 50, 0.001)}}
    fitted = gap_table(components, gaps, np.arange(2), fits).set_index(["method", "component"])
    assert fitted.loc[("optimal", "a0.h1"), ["converged", "steps", "left_nats"]].tolist() == [False, 150, 0.02]
    assert fitted.loc[("optimal", "a0.h0"), ["converged", "steps", "left_nats"]].tolist() == [True, 50, 0.001]
    assert fitted.loc["mean", "converged"].isna().all()
    only = summary_table(gap_table(components, {"zero": gaps["mean"]}, np.arange(2)))
    assert pd.isna(only["spearman_with_counterfactual"]).all()


def test_kl_and_standard_error_against_numpy():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 4, 7)), rng.normal(size=(4, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (target, logits))
    expected = (p * np.log(p / q)).sum(-1)
    found = kl_divergence(torch.from_numpy(target).log_softmax(-1), torch.from_numpy(logits))
    assert np.allclose(found.numpy(), expected)
    mean, se = clustered_means_and_ses(torch.from_numpy(expected), np.arange(4))
    assert np.allclose(mean, expected.mean(1)) and np.allclose(se, expected.std(1, ddof=1) / 2)


def test_statistics_of_moments_against_numpy(setting):
    model, prompts, _, statistics = setting
    assert isinstance(statistics, Statistics)
    z = clean_pass(model, prompts.tokens, prompts.lengths).z[1].double().numpy()  # [B, T, H, k]
    lengths, shortest = prompts.lengths.numpy(), int(prompts.lengths.min())
    start = max(1, min(9, shortest - 1))
    pool = np.concatenate([z[b, start:length] for b, length in enumerate(lengths)])
    assert np.allclose(statistics.mean["head"][1], pool.mean(0), atol=1e-5)
    assert np.allclose(statistics.std["head"][1], pool.std(0), atol=1e-4)
    late = np.concatenate([z[b, shortest:length] for b, length in enumerate(lengths)])
    expected = [z[:, t].mean(0) for t in range(shortest)] + [late.mean(0)]
    assert np.allclose(statistics.mean_positional["head"][1].movedim(-2, 0), np.stack(expected), atol=1e-5)
