"""Causal tracing against TransformerLens hooks, its limits, its statistics, and the fit of its constants."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BRIDGED, random_hf

from oacore.config.tracing import Tracing, TracingFit
from oacore.engine.clean import clean_pass
from oacore.engine.forward import embed, embed_tokens, logits_of
from oacore.errors import UserError
from oacore.fits.convergence import Convergence
from oacore.fits.resume import Resumable
from oacore.metrics import clustered_mean_and_se
from oacore.models.load import canonical
from oacore.store.provenance import Provenance
from oacore.tasks.prompts import build
from oacore.tracing.corruptions import SubjectSources, corruptor
from oacore.tracing.effects import Traced, aie_table, effects, fits_behind
from oacore.tracing.facts import TracedFacts, traced_facts
from oacore.tracing.fit import (
    NO_CONSTANTS,
    PlaceConstants,
    fit_place_constants,
    load_place_constants,
    lost_probability,
    lost_probability_gradient,
    place_constants,
    save_place_constants,
)
from oacore.tracing.places import NOWHERE, Curve, Place, place, window
from oacore.tracing.recall import Recall, answer_probability, completes, embedded, recall_of
from oacore.tracing.restore import corrupted_run, restored, restored_together
from oacore.tracing.subjects import subject_statistics
from oacore.tracing.trace import trace

LENGTHS = (9, 7, 8)  # ragged, as are the answers
HOOKS = {"attention": "blocks.{}.hook_attn_out", "mlp": "blocks.{}.hook_mlp_out", "block": "blocks.{}.hook_resid_post"}


def some_recall(n_answers=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 97, (3, max(LENGTHS)), generator=draw)
    lengths = torch.tensor(LENGTHS)
    counts = torch.tensor([n_answers, 1, max(1, n_answers - 1)])
    answer = torch.where(
        torch.arange(n_answers) < counts[:, None], torch.randint(1, 97, (3, n_answers), generator=draw), -1
    )
    tokens = torch.nn.functional.pad(tokens, (0, n_answers - 1))
    for row, count in enumerate(counts.tolist()):
        tokens[row, LENGTHS[row] : LENGTHS[row] + count - 1] = answer[row, : count - 1]
    other = tokens.clone()
    subject = torch.tensor([[1, 3], [2, 5], [3, 4]])
    for row, (first, end) in enumerate(subject.tolist()):
        other[row, first:end] = torch.randint(1, 97, (end - first,), generator=draw)
    return Recall(tokens, lengths + counts - 1, lengths - 1, subject, answer, other, torch.arange(3), torch.arange(3))


PLACES = [
    Place("attention", "last", 0, 1),
    Place("mlp", "last_subject", 1, 1),
    Place("block", "all_subject", 0, 0),
    Place("mlp", "all_subject", 0, 2),
    Place("attention", "all_subject", 2, 2),
    Place("mlp", "last", 2, 2),
    Place("attention", 4, 1, 2),
    Place("block", "last", 2, 2),
    NOWHERE,
]


@pytest.fixture(scope="module")
def gpt2():
    return canonical(random_hf("gpt2"))


def with_bridge(name, recall, added):
    """Answer log-probabilities [places, B] by hooks on a TransformerBridge: the subject's embeddings get `added` [B, T,
    d].
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = random_hf(name)
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, tokenizer=None)
    inside = recall.in_subject[..., None]
    clean = {}

    def run(hooks):
        return bridge.run_with_hooks(recall.tokens, fwd_hooks=hooks, return_type="logits")

    def keep(value, hook):
        clean[hook.name] = value.clone()

    run([(HOOKS[site].format(layer), keep) for site in HOOKS for layer in range(3)])
    found = []
    for item in PLACES:
        mask = recall.at_positions(item.position)[..., None]

        def restore(value, hook, mask=mask):
            return torch.where(mask, clean[hook.name], value)

        def corrupt(value, hook):
            return torch.where(inside, value + added, value)

        hooks = [(HOOKS[item.site].format(layer), restore) for layer in range(item.first, item.last + 1)]
        logits = run([("embed.hook_out", corrupt), *hooks])
        rows = []
        for row, first in enumerate(recall.last.tolist()):
            ids = [token for token in recall.answer[row].tolist() if token >= 0]
            log_probs = logits[row].log_softmax(-1)
            rows.append(sum(log_probs[first + k, token] for k, token in enumerate(ids)))
        found.append(torch.stack(rows))
    return torch.stack(found)


@pytest.mark.parametrize("n_answers", [1, 3])
@pytest.mark.parametrize("name", [name for name in BRIDGED if not name.startswith("llama-")])
def test_restored_runs_are_the_bridges(name, n_answers):
    """Same corruption by hooks on the token embedding and on what each site writes; one and several answer tokens;
    ragged prompts.
    """
    model, recall = canonical(random_hf(name)), some_recall(n_answers)
    added = torch.randn(3, recall.tokens.shape[1], model.d_model, generator=torch.Generator().manual_seed(2)) * 0.3
    with torch.no_grad():
        expected = with_bridge(name, recall, added)
        clean = clean_pass(model, recall.tokens, recall.lengths)
        start = embedded(model, recall, embed_tokens(model, recall.tokens) + added)
        for found in (
            restored(model, recall, clean, PLACES, corrupted_run(model, start)),  # the places share the corrupted run
            restored(model, recall, clean, PLACES, [start.expand(len(PLACES), -1, -1, -1)]),  # each has its own
        ):
            assert (found.log() - expected).abs().max() < 1e-4
    assert expected.std(0).min() > 1e-3, "places that change nothing test nothing"


@pytest.mark.parametrize("n_answers", [1, 2])
def test_all_restored_is_clean_and_nothing_restored_is_corrupted(n_answers):
    """To within float64's rounding: other numbers of rows are other matrix products."""
    model, recall = canonical(random_hf("gpt2").double()), some_recall(n_answers)
    clean = clean_pass(model, recall.tokens, recall.lengths)
    p_clean = answer_probability(model, recall, clean.entering[-1])
    start = embedded(model, recall, torch.zeros(model.d_model))
    run = corrupted_run(model, start)
    p_corrupted = answer_probability(model, recall, run[-1])
    assert (p_corrupted / p_clean - 1).abs().min() > 1e-4
    everything = Place("block", "last", 0, 2)
    for entering in (run, [start.expand(2, -1, -1, -1)]):
        found = restored(model, recall, clean, [NOWHERE, everything], entering)
        assert torch.allclose(found[0], p_corrupted, rtol=1e-12, atol=0)
        if n_answers == 1:  # the residual at the position read is all that the answer depends on
            assert torch.allclose(found[1], p_clean, rtol=1e-12, atol=0)
    uncorrupted = corrupted_run(model, embed(model, recall.tokens))
    assert torch.allclose(
        restored(model, recall, clean, PLACES, uncorrupted), p_clean.expand(len(PLACES), -1), rtol=1e-12, atol=0
    )


def test_places_do_not_depend_on_how_they_are_batched(gpt2):
    recall, draw = some_recall(), torch.Generator().manual_seed(5)
    clean = clean_pass(gpt2, recall.tokens, recall.lengths)
    start = embedded(gpt2, recall, torch.randn(3, 9, gpt2.d_model, generator=draw))
    whole = restored_together(gpt2, recall, clean, PLACES, start, 10_000)
    assert torch.allclose(whole, restored_together(gpt2, recall, clean, PLACES, start, 64), rtol=1e-5)
    alone = torch.cat([restored_together(gpt2, recall, clean, [item], start, 64) for item in PLACES])
    assert torch.allclose(whole, alone, rtol=1e-5)


def test_windows_are_clipped_and_start_at_layer_0():
    assert [window(layer, 5, 6) for layer in range(6)] == [(0, 2), (0, 3), (0, 4), (1, 5), (2, 5), (3, 5)]
    assert window(0, 1, 6) == (0, 0) and window(5, 9, 6) == (1, 5)
    assert place("mlp", "last", 1, 9, 4) == place("mlp", "last", 2, 9, 4) == Place("mlp", "last", 0, 3)


def test_recall_of_prompts_appends_all_of_the_answer_but_its_last_token():
    spans, answers = [(1, 3), (2, 3)], [[7, 8, 9], [5]]
    prompts = build(
        "facts",
        "test",
        ["a", "b"],
        [[0, 1, 2, 3], [0, 4, 6]],
        [[0, 2, 1, 3], [0, 4, 5]],
        [[7], [5]],
        [[-1], [-1]],
        spans,
        {},
        answers,
    )
    first = recall_of(prompts, "first_token")
    assert first.answer.tolist() == [[7], [5]] and first.tokens.tolist() == [[0, 1, 2, 3], [0, 4, 6, 0]]
    joint = recall_of(prompts, "joint")
    assert (
        joint.answer.tolist() == [[7, 8, 9], [5, -1, -1]]
        and joint.last.tolist() == [3, 2]
        and joint.lengths.tolist() == [6, 3]
    )
    assert joint.tokens[0].tolist() == [0, 1, 2, 3, 7, 8] and joint.other[0].tolist() == [0, 2, 1, 3, 7, 8]
    assert joint.tokens[1, :3].tolist() == [0, 4, 6] and joint.in_subject[0].tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]


def test_joint_probability_and_greedy_completion_token_by_token(gpt2):
    recall = some_recall(3)
    residual = clean_pass(gpt2, recall.tokens, recall.lengths).entering[-1]
    p = answer_probability(gpt2, recall, residual)
    log_probs = logits_of(gpt2, residual).log_softmax(-1)
    for row, first in enumerate(recall.last.tolist()):
        ids = [token for token in recall.answer[row].tolist() if token >= 0]
        assert p[row] == pytest.approx(
            float(sum(log_probs[row, first + k, token] for k, token in enumerate(ids)).exp()), rel=1e-5
        )
    greedy = recall.answer.clone()
    greedy[0, 0] = log_probs[0, recall.last[0]].argmax()
    known = replace(recall, tokens=recall.tokens.clone(), answer=greedy)
    known.tokens[0, LENGTHS[0]] = greedy[0, 0]
    for k in (1, 2):
        logits = logits_of(gpt2, clean_pass(gpt2, known.tokens, known.lengths).entering[-1])[0, recall.last[0] + k]
        known.answer[0, k] = logits.argmax()
        if k == 1:
            known.tokens[0, LENGTHS[0] + 1] = logits.argmax()
    assert completes(gpt2, known, 64)[0]
    known.answer[0, 2] += 1
    assert not completes(gpt2, known, 64)[0]


def test_subject_statistics_and_noise(gpt2):
    recall = some_recall()
    statistics = subject_statistics(gpt2, recall)
    rows = torch.cat([gpt2.W_E[recall.tokens[i, a:b]] for i, (a, b) in enumerate(recall.subject.tolist())]).double()
    assert torch.allclose(statistics.mean.double(), rows.mean(0)) and torch.allclose(
        statistics.std.double(), rows.std(0)
    )
    assert statistics.scalar_std == pytest.approx(float(rows.flatten().std()))
    sources = SubjectSources(gpt2, statistics, torch.empty(0), 1.0, seed=3)
    one = sources.noise(recall, 0)
    assert (one[~recall.in_subject] == 0).all() and one[recall.in_subject].std() == pytest.approx(1, abs=0.15)
    assert torch.equal(sources.noise(recall.take(slice(1, 2)), 0)[0], one[1, :7]), "each fact has its own stream"
    assert not torch.equal(sources.noise(recall, 1), one)
    for name, sigma in (("gaussian-2", statistics.std), ("gaussian_scalar-2", statistics.scalar_std)):
        corrupt = corruptor(name, gpt2, statistics, NO_CONSTANTS, 3, 4)
        expected = embed(gpt2, recall.tokens) + 2 * sigma * one
        assert corrupt.n_draws == 4 and torch.allclose(corrupt(recall, 0), expected, atol=1e-6)


def test_constants_and_replaced_tokens(gpt2):
    recall = some_recall()
    statistics = subject_statistics(gpt2, recall)
    mean = corruptor("mean", gpt2, statistics, NO_CONSTANTS, 0, 5)
    start = mean(recall, 0)
    clean = embed(gpt2, recall.tokens)
    assert mean.n_draws == 1 and torch.equal(start[~recall.in_subject], clean[~recall.in_subject])
    assert torch.allclose(start[0, 2], statistics.mean + gpt2.W_pos[2])
    other = corruptor("token_replacement", gpt2, statistics, NO_CONSTANTS, 0, 5)
    assert torch.equal(other(recall, 0), embed(gpt2, recall.other))
    constants = torch.stack((torch.zeros(gpt2.d_model), torch.ones(gpt2.d_model)))  # the corrupted run's comes last
    shared = corruptor("oat_shared", gpt2, statistics, PlaceConstants(-constants, constants), 0, 5)
    assert torch.allclose(shared(recall, 0)[1, 4], constants[1] + gpt2.W_pos[4])


def test_tracing_averages_over_draws_and_batches(gpt2):
    recall = some_recall()
    corrupt = corruptor("gaussian-1", gpt2, subject_statistics(gpt2, recall), NO_CONSTANTS, 0, 3)
    whole = trace(gpt2, recall, PLACES[:4], corrupt, 10_000, "")
    small = trace(gpt2, recall, PLACES[:4], corrupt, 64, "")
    for name in ("clean", "corrupted", "restored"):
        assert torch.allclose(getattr(whole, name), getattr(small, name), rtol=1e-5)
    clean = clean_pass(gpt2, recall.tokens, recall.lengths)
    draws = [restored_together(gpt2, recall, clean, PLACES[:4], corrupt(recall, draw), 10_000) for draw in range(3)]
    assert torch.allclose(whole.restored, torch.stack(draws).mean(0), rtol=1e-5)


def test_gradients_of_every_place_are_those_of_finite_differences():
    model = canonical(random_hf("gpt2").double())
    recall, draw = some_recall(2), torch.Generator().manual_seed(1)
    constants = torch.randn(len(PLACES), model.d_model, generator=draw, dtype=torch.float64) * 0.2
    gradient = lost_probability_gradient(model, recall, PLACES, constants, 64)
    assert torch.allclose(gradient, lost_probability_gradient(model, recall, PLACES, constants, 10_000))
    step = 1e-5 * torch.randn(constants.shape, generator=draw, dtype=torch.float64)

    def exact(values):
        clean = clean_pass(model, recall.tokens, recall.lengths)
        p = answer_probability(model, recall, clean.entering[-1])
        rows = [
            restored(model, recall, clean, [item], [embedded(model, recall, value)[None]])[0]
            for item, value in zip(PLACES, values, strict=True)
        ]
        return (p - torch.stack(rows)).clamp(min=0).mean(1)

    with torch.no_grad():
        slope = exact(constants + step) - exact(constants - step)
        lost = lost_probability(model, recall, PLACES, constants, 64)
        assert torch.allclose(lost.mean(1), exact(constants), rtol=1e-12)
    assert torch.allclose(slope, 2 * (gradient * step).sum(1), rtol=1e-4, atol=1e-13)
    assert (gradient.abs().sum(1) > 0).sum() >= 5


SHORT = TracingFit(batch_size=2, learning_rate=0.02, first_round=5, max_steps=75)


def test_fit_lowers_every_loss_and_resumes_bit_by_bit(gpt2, tmp_path):
    recall, statistics = some_recall(), subject_statistics(gpt2, some_recall())
    places = [PLACES[0], PLACES[1], NOWHERE]
    whole = fit_place_constants(gpt2, places, recall, recall, statistics, SHORT)
    before = lost_probability(gpt2, recall, places, statistics.mean.repeat(3, 1), 10_000).mean(1)
    assert (whole.best_loss < 0.9 * before).all()
    assert torch.allclose(lost_probability(gpt2, recall, places, whole.best, 10_000).mean(1), whole.best_loss)

    class KilledError(Exception):
        pass

    tests = []

    def kill():
        tests.append(1)
        if len(tests) == 2:
            raise KilledError

    def resumable():
        return Resumable(tmp_path / "checkpoint.safetensors", "a")

    with pytest.raises(KilledError), resumable() as kept:
        fit_place_constants(gpt2, places, recall, recall, statistics, SHORT, resumable=kept, on_test=kill)
    assert (tmp_path / "checkpoint.safetensors").exists()
    resumed = fit_place_constants(gpt2, places, recall, recall, statistics, SHORT, resumable=resumable())
    assert torch.equal(resumed.best, whole.best) and torch.equal(resumed.curve_losses, whole.curve_losses)


def test_constants_of_places_are_used_place_by_place(gpt2):
    recall, places, statistics = some_recall(), PLACES[:4], subject_statistics(gpt2, some_recall())
    constants = torch.randn(5, gpt2.d_model, generator=torch.Generator().manual_seed(4))
    both = PlaceConstants(constants, constants.flip(0))
    traced = trace(gpt2, recall, places, corruptor("oat", gpt2, statistics, both, 0, 1), 64, "")
    for row, item in enumerate([*places, NOWHERE]):
        shared = corruptor("oat_shared", gpt2, statistics, PlaceConstants(constants, constants[: row + 1]), 0, 1)
        alone = trace(gpt2, recall, [item], shared, 10_000, "")
        of_place = traced.corrupted if item == NOWHERE else traced.restored[row]
        assert torch.allclose(of_place, alone.restored[0], rtol=1e-5)
    cautious = trace(gpt2, recall, places, corruptor("oat_cautious", gpt2, statistics, both, 0, 1), 64, "")
    turned = PlaceConstants(constants.flip(0), constants)
    own = trace(gpt2, recall, places, corruptor("oat", gpt2, statistics, turned, 0, 1), 64, "")
    assert torch.equal(cautious.restored, own.restored), "each takes the constants that it is named for"


def test_cautious_constants_leave_the_shared_one_only_beyond_chance(gpt2):
    """A place that restores nothing has the corrupted run's constant, whatever its own fit ended at."""
    recall, statistics = some_recall(), subject_statistics(gpt2, some_recall())
    places = [Place("mlp", "last", 0, 0), Place("block", "all_subject", 2, 1), NOWHERE]  # the second is empty, too
    descent = fit_place_constants(gpt2, places, recall, recall, statistics, SHORT)
    fitted = place_constants(gpt2, places, recall, descent.best, 10_000)
    assert torch.equal(fitted.own, descent.best)
    shared = fitted.cautious[-1]
    assert torch.equal(fitted.cautious[1], shared)
    lost = lost_probability(gpt2, recall, [NOWHERE] * 3, descent.best, 10_000).mean(1)
    assert torch.equal(shared, descent.best[lost.argmin()]), "the best of all for the corrupted run"
    assert torch.equal(fitted.cautious[0], shared) or torch.equal(fitted.cautious[0], fitted.own[0])


def test_place_constants_are_read_by_name(gpt2, tmp_path):
    """In any order; a place that was not fitted is an error that names the file."""
    recall, places, path = some_recall(), [PLACES[0], PLACES[1], NOWHERE], tmp_path / "constants.safetensors"
    descent = fit_place_constants(gpt2, places, recall, recall, subject_statistics(gpt2, recall), SHORT)
    constants = place_constants(gpt2, places, recall, descent.best, 10_000)
    save_place_constants(path, places, constants, descent, Provenance({"model_hash": "a"}))
    read = load_place_constants(path, places[::-1], Provenance())
    assert torch.equal(read.own, constants.own.flip(0)) and torch.equal(read.cautious, constants.cautious.flip(0))
    with pytest.raises(UserError, match=r"constants.safetensors: nothing fitted for mlp.last.2-2"):
        load_place_constants(path, [PLACES[5]], Provenance())
    with pytest.raises(UserError, match="model_hash"):
        load_place_constants(path, places, Provenance({"model_hash": "b"}))


def test_effects_by_hand():
    clean, corrupted = torch.tensor([0.9, 0.8, 0.7, 1.0]), torch.tensor([0.1, 0.2, 0.3, 0.0])
    found = torch.tensor([[0.5, 0.9, 0.3, 0.5]])
    row = effects(Traced(clean, corrupted, found), 0, np.arange(4))
    change = np.array([0.4, 0.7, 0.0, 0.5])
    assert row["aie"] == pytest.approx(change.mean()) and row["se"] == pytest.approx(change.std(ddof=1) / 2, rel=1e-6)
    lost, destroyed = np.array([0.4, 0.0, 0.4, 0.5]), np.array([0.8, 0.6, 0.4, 1.0])
    share = lost.mean() / destroyed.mean()
    assert row["aie_normalised"] == pytest.approx(1 - share) and row["n"] == 4
    assert row["se_normalised"] == pytest.approx(
        (lost - share * destroyed).std(ddof=1) / 2 / destroyed.mean(), rel=1e-6
    )
    assert row["p_restored"] == pytest.approx(0.55) and row["p_corrupted"] == pytest.approx(0.15)


def test_effects_below_the_resolution_of_probabilities_are_none():
    clean = torch.tensor([0.9, 0.8, 0.7, 1.0])
    noise = torch.tensor([3e-8, -6e-8, 6e-8, 0.0])
    row = effects(Traced(clean, clean - noise, (clean + noise)[None]), 0, np.arange(4))
    assert row["aie"] == row["se"] == 0 and np.isnan(row["aie_normalised"]) and np.isnan(row["se_normalised"])
    for change in (
        1e-6,
        2e-5,
    ):  # one fact in four lost as much as rounding, and another came back a little too low: a share of -600
        lost = torch.tensor([4 * change / 5, 0, 0, 0])
        share = effects(
            Traced(clean, clean - lost, (clean - torch.tensor([0.0, 0.01, 0.0, 0.0]))[None]), 0, np.arange(4)
        )["aie_normalised"]
        assert np.isnan(share) == (change == 1e-6)
    row = effects(Traced(clean, clean - 0.5, (clean - 0.5 + noise)[None]), 0, np.arange(4))
    assert row["aie"] == 0 and row["aie_normalised"] == pytest.approx(0, abs=1e-6)


def test_standard_errors_are_over_subjects():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    mean, se = clustered_mean_and_se(values, np.array([3, 1, 2, 0]))
    assert mean == 3.75 and se == pytest.approx(float(values.std()) / 2)
    # Each fact told three times in the same words is no more evidence than once.
    again, same = clustered_mean_and_se(values.repeat(3), np.tile(np.arange(4), 3))
    assert again == 3.75 and same == pytest.approx(se)
    assert np.isnan(clustered_mean_and_se(values, np.zeros(4))[1])


def test_table_has_a_row_per_layer_with_clipped_windows():
    places = [Place("mlp", "last", 0, 1), Place("mlp", "last", 0, 2), Place("mlp", "last", 1, 2)]
    traced = Traced(torch.full((2,), 0.9), torch.full((2,), 0.1), torch.tensor([[0.2, 0.2], [0.4, 0.4], [0.3, 0.3]]))
    table = aie_table("mean", traced, places, np.arange(2), [Curve("mlp", "last", 3)], 3)
    assert list(table["layer"]) == [0, 1, 2] and table["aie"].tolist() == pytest.approx([0.1, 0.3, 0.2])
    assert isinstance(table, pd.DataFrame) and (table["corruption"] == "mean").all() and (table["window"] == 3).all()
    assert table["converged"].isna().all() and table["left"].isna().all()


def test_a_number_says_how_the_fits_of_its_place_and_of_the_corrupted_run_came_out():
    places = [Place("mlp", "last", 0, 1), Place("mlp", "last", 0, 2), Place("mlp", "last", 1, 2)]
    traced = Traced(torch.full((2,), 0.9), torch.full((2,), 0.1), torch.full((3, 2), 0.2))
    ends = ((True, 50, 0.001), (False, 150, 0.02), (True, 150, 0.0), (True, 50, 0.003))
    fits = {place.name: Convergence(*end) for place, end in zip([*places, NOWHERE], ends, strict=True)}
    curves = [Curve("mlp", "last", 3)]
    own = aie_table("oat", traced, places, np.arange(2), curves, 3, fits_behind("oat", fits))
    assert own["converged"].tolist() == [True, False, True] and own["steps"].tolist() == [50, 150, 150]
    assert own["left"].tolist() == pytest.approx([0.004, 0.023, 0.003])
    shared = aie_table("oat_shared", traced, places, np.arange(2), curves, 3, fits_behind("oat_shared", fits))
    assert shared["converged"].all() and shared["left"].tolist() == [0.003] * 3
    assert fits_behind("mean", fits) == {}


def test_pictures_are_the_first_facts_of_subjects_or_those_asked_for():
    recall = some_recall()
    recall.tokens[2, 3:4] = recall.tokens[0, 1]  # no subject twice: spans of other lengths
    texts, both = ["a is", "b is", "c is", "a was"], torch.tensor([0, 1, 2, 0])

    pictured = TracedFacts({"test": recall.take(both)}, texts, None, {}).pictured
    assert pictured(3) == [0, 1, 2] and pictured(4) == [0, 1, 2, 3] and pictured(("was", "b")) == [3, 1]
    with pytest.raises(UserError, match=r"tracing.pictures: 5; allowed: up to the 4 test facts"):
        pictured(5)
    with pytest.raises(UserError, match=r"tracing.pictures: no test fact .* contains 'zebra'; .*'a is'; 'b is'"):
        pictured(("zebra",))


def test_a_corrupt_prompt_about_the_same_subject_replaces_no_subject(gpt2):
    tokens = [[0, 5, 6, 7], [0, 8, 6, 7]]
    corrupt = [[0, 5, 6, 9], [0, 9, 6, 7]]
    prompts = build("mine", "train", ["a", "b"], tokens, corrupt, [[1], [2]], [[], []], [(1, 2), (1, 2)])
    with pytest.raises(
        UserError, match=r"'token_replacement' .* subject's own in 1 train prompts of mine: 'a'; allowed"
    ):
        traced_facts(gpt2, {"train": prompts}, Tracing(), 64)
