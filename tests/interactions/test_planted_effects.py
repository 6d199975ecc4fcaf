"""Effects and interactions of planted models against closed forms, under each ablation type."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from planted.effects import (
    ANSWER,
    GATE,
    MESSAGE,
    ONE_OF_EACH,
    OTHER,
    WORD,
    WORDS,
    Neurons,
    judge_of,
    linear,
    planted,
)

from oacore.config.circuits import Refit
from oacore.interactions.effects import measure

SHORT = Refit(batch_size=8, first_round=10, max_steps=30)  # the mean is optimal where no constant favours a word
LONG = Refit(batch_size=8, first_round=40, max_steps=120)  # ... and where one opens what another head needs
CONSTANT = ("optimal", "mean", "zero")  # one value for all prompts
OF_ANOTHER = ("resample", "counterfactual")  # the value on a prompt of another word
ALL = (*CONSTANT, *OF_ANOTHER)
EXACT = 2e-4  # nats: rounding of the norms, and what fits leave


def answers(own, another=0.0):
    """Log-probabilities if the right word has one logit, another word's second, and all others 0."""
    logits = np.zeros(WORDS)
    logits[0], logits[1] = own, another
    return logits - np.log(np.exp(logits).sum())


def kl(clean, own, another=0.0):
    """Nats that are lost if the right word's logit `clean` becomes `own`, and another word's becomes `another`."""
    target, found = answers(clean), answers(own, another)
    return float((np.exp(target) * (target - found)).sum())


def tables(model, ablation, components, folder, mediators="component", fit=SHORT):
    found, _ = measure(judge_of(model, ablation, folder, fit), components, mediators)
    effects = found.effects.set_index("component")
    paths = found.paths.set_index(["component", "mediator"])["nats"]
    pairs = found.interactions.set_index(["first", "second"])["interaction_nats"]
    return effects, paths, pairs


def copies(size, message=0.0, gate=0.0):
    """A head that reads the word and writes its answer, and perhaps a message or a constant."""
    parts = [(WORD, size * ONE_OF_EACH, ANSWER), (WORD, message * ONE_OF_EACH, MESSAGE)]
    return linear(*parts, (WORD, torch.full((WORDS, 1), gate), GATE))


@pytest.mark.parametrize("ablation", ALL)
def test_two_copies_are_redundant(ablation, tmp_path):
    """Either of two heads is enough (OR): losing both costs far more than the sum. Another prompt's value spoofs."""
    model = planted({"a0.h0": copies(6), "a0.h1": copies(6)}, {})
    effects, _, pairs = tables(model, ablation, ["a0.h0", "a0.h1"], tmp_path, "layer")
    alone, both = (kl(12, 6), kl(12, 0)) if ablation in CONSTANT else (kl(12, 6, 6), kl(12, 0, 12))
    assert effects["total_nats"].tolist() == pytest.approx([alone, alone], abs=EXACT)
    assert effects["direct_nats"].tolist() == pytest.approx([alone, alone], abs=EXACT)
    assert pairs.item() == pytest.approx(both - 2 * alone, abs=2 * EXACT) and pairs.item() > 1
    if ablation in CONSTANT:
        assert alone < 0.02, "one of them is hardly missed"


@pytest.mark.parametrize("ablation", ALL)
def test_a_chain_cooperates(ablation, tmp_path):
    """One head writes what the other reads: each alone costs all, and both together no more."""
    model = planted(
        {"a0.h0": linear((WORD, ONE_OF_EACH, MESSAGE)), "a1.h1": linear((MESSAGE, 12 * ONE_OF_EACH, ANSWER))}, {}
    )
    effects, paths, pairs = tables(model, ablation, ["a0.h0", "a1.h1"], tmp_path)
    everything = kl(12, 0) if ablation in CONSTANT else kl(12, 0, 12)
    assert effects["total_nats"].tolist() == pytest.approx([everything] * 2, rel=1e-3)
    assert effects["direct_nats"].tolist() == pytest.approx([0, everything], rel=1e-3, abs=EXACT)
    assert effects["indirect_nats"].tolist() == pytest.approx([everything, 0], rel=1e-3, abs=EXACT)
    assert paths["a0.h0", "a1.h1"] == pytest.approx(everything, rel=1e-3)
    others = paths["a0.h0"].drop("a1.h1")
    assert set(others.index) == {"m0", "a1.h0", "m1", "logits"} and others.abs().max() < EXACT
    assert pairs.item() == pytest.approx(-everything, rel=1e-3)


@pytest.mark.parametrize("ablation", ALL)
def test_independent_components_do_not_interact(ablation, tmp_path):
    """One head knows the word's row of a table, the other its column: what is lost of one says nothing of the other."""
    rows, columns = 2, 4
    place = torch.tensor(list(itertools.product(range(rows), range(columns))))  # [W, 2]
    both = torch.zeros(WORDS, WORDS)
    both[torch.arange(WORDS), place[:, 0]] = both[torch.arange(WORDS), rows + place[:, 1]] = 1
    row = torch.diag(torch.arange(WORDS) < rows).float()
    column = torch.diag((torch.arange(WORDS) >= rows) & (torch.arange(WORDS) < rows + columns)).float()
    heads = {"a0.h0": linear((WORD, 6 * row, ANSWER)), "a1.h0": linear((WORD, 6 * column, ANSWER))}
    effects, _, pairs = tables(planted(heads, {}, both, both), ablation, ["a0.h0", "a1.h0"], tmp_path, "layer")
    assert effects["total_nats"].min() > 0.5
    assert pairs.item() == pytest.approx(0, abs=5e-4 * effects["total_nats"].sum())


@pytest.mark.parametrize("ablation", ALL)
def test_direct_and_mediated_effects_have_their_planted_sizes(ablation, tmp_path):
    """A head speaks for the answer by itself (3), by a head that reads it (2), and by an MLP (4)."""
    heads = {"a0.h0": copies(3, message=1), "a1.h1": linear((MESSAGE, 2 * ONE_OF_EACH, ANSWER))}
    model = planted(heads, {"m1": Neurons.of((MESSAGE, ONE_OF_EACH), size=4)})
    effects, paths, pairs = tables(model, ablation, ["a0.h0", "m1"], tmp_path)

    def losing(size):
        return kl(9, 9 - size) if ablation in CONSTANT else kl(9, 9 - size, size)

    of_head = effects.loc["a0.h0"]
    expected = {"total_nats": 9, "direct_nats": 3, "indirect_nats": 6}
    assert [of_head[name] for name in expected] == pytest.approx([losing(n) for n in expected.values()], rel=2e-3)
    sizes = {"m0": 0, "a1.h0": 0, "a1.h1": 2, "m1": 4, "logits": 3}
    assert paths["a0.h0"].to_dict() == pytest.approx({m: losing(n) for m, n in sizes.items()}, rel=2e-3, abs=EXACT)
    assert pairs.item() == pytest.approx(-losing(4), rel=3e-3), "what the MLP does is a part of what the head does"
    of_mlp = effects.loc["m1"]  # which only the logits read
    assert of_mlp["total_nats"] == of_mlp["direct_nats"] and of_mlp["indirect_nats"] == of_mlp["self_repair_nats"] == 0


@pytest.mark.parametrize("ablation", ["optimal", "resample"])
def test_the_order_of_a_pair_does_not_matter_and_same_seeds_give_same_bits(ablation, tmp_path):
    model = planted({"a0.h0": copies(5), "a0.h1": copies(4), "a1.h0": copies(3)}, {})
    names = ["a0.h0", "a0.h1", "a1.h0"]
    effects, _, pairs = tables(model, ablation, names, tmp_path / "one", "layer")
    other, _, turned = tables(model, ablation, names[::-1], tmp_path / "other", "layer")
    assert {(j, i): value for (i, j), value in pairs.items()} == turned.to_dict()
    pd.testing.assert_frame_equal(effects, other.loc[effects.index])


@pytest.mark.parametrize("ablation", ALL)
def test_a_backup_head_repairs(ablation, tmp_path):
    """A later head writes the answer as far as it has not been given: nothing is lost with the first head alone, but
    all by its direct path alone, as the backup still hears that the answer is there.
    """
    backup = linear((WORD, 6 * ONE_OF_EACH, ANSWER), (MESSAGE, -6 * ONE_OF_EACH, ANSWER))
    model = planted({"a0.h0": copies(6, message=1), "a1.h0": backup}, {})
    effects, _, pairs = tables(model, ablation, ["a0.h0", "a1.h0"], tmp_path, "layer")
    everything = kl(6, 0) if ablation in CONSTANT else kl(6, 0, 6)
    head = effects.loc["a0.h0"]
    assert head["total_nats"] == pytest.approx(0, abs=EXACT)
    assert head["direct_nats"] == pytest.approx(everything, rel=1e-3)
    assert head["self_repair_nats"] == pytest.approx(everything, rel=1e-3)
    assert effects.loc["a1.h0", "total_nats"] == pytest.approx(0, abs=EXACT)
    assert pairs.item() == pytest.approx(everything, rel=1e-3)


@pytest.mark.parametrize("ablation", ["optimal", "mean", "zero"])
def test_a_mean_can_keep_a_backup_shut(ablation, tmp_path):
    """A head tells a backup by a constant to keep still. Its mean goes on telling; zero lets the backup speak too
    loud; the optimal constant lets it say just what was lost.
    """
    backup = Neurons.of((WORD, ONE_OF_EACH), (GATE, torch.full((1, WORDS), -0.95)), size=20)
    model = planted({"a0.h0": copies(4, gate=1)}, {"m1": backup})
    effects, _, _ = tables(model, ablation, ["a0.h0"], tmp_path, "layer", LONG)
    head, direct = effects.loc["a0.h0"], kl(5, 1)
    total = {"optimal": 0, "mean": direct, "zero": kl(5, 20)}[ablation]
    assert head["direct_nats"] == pytest.approx(direct, rel=1e-3)
    assert head["total_nats"] == pytest.approx(total, rel=2e-3, abs=0.02)
    assert head["self_repair_nats"] == pytest.approx(direct - total, rel=2e-3, abs=0.02)
    assert kl(5, 20) > 0.3 and direct > 1, "what the other two constants do is far from nothing"


@pytest.mark.parametrize("ablation", ["optimal", "zero"])
def test_zero_takes_redundancy_for_cooperation(ablation, tmp_path):
    """Neurons that need two heads at once (AND), which both say the same word: zeros silence the neurons whichever head
    they are for; a constant that always says yes leaves the other head's word, so that either is enough.
    """
    heads = {"a0.h0": linear((WORD, ONE_OF_EACH, MESSAGE)), "a0.h1": linear((WORD, ONE_OF_EACH, OTHER))}
    model = planted(heads, {"m1": Neurons.of((MESSAGE, ONE_OF_EACH), (OTHER, ONE_OF_EACH), bias=-1.0, size=12)})
    effects, _, pairs = tables(model, ablation, ["a0.h0", "a0.h1"], tmp_path, "layer", LONG)
    everything, alone = kl(12, 0), {"optimal": 0, "zero": kl(12, 0)}[ablation]
    assert effects["total_nats"].tolist() == pytest.approx([alone, alone], abs=0.02)
    assert pairs.item() == pytest.approx(everything - 2 * alone, abs=0.04)


def test_different_facts_that_are_both_needed_cooperate(tmp_path):
    """Two bits, of which both together speak for one word: what is lost with either bit makes the other worth less. The
    truth by a grid over all constants.
    """
    bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))  # [W, 3], the last without a meaning
    words = torch.nn.functional.pad(bits[:, :2], (0, WORDS - 2))
    first, second, both = torch.zeros(3, WORDS, WORDS)
    first[0, 0] = second[1, 1] = both[0, 0] = both[1, 0] = 1
    heads = {"a0.h0": linear((WORD, first, MESSAGE)), "a0.h1": linear((WORD, second, MESSAGE))}
    model = planted(heads, {"m1": Neurons.of((MESSAGE, both), bias=-0.9, size=12)}, words)
    effects, _, pairs = tables(model, "optimal", ["a0.h0", "a0.h1"], tmp_path, "layer", LONG)

    def logit(of_bits):
        return 12 * np.maximum(of_bits - 0.9, 0)

    def lost(logits):
        """Mean nats [...] if the word that both bits speak for has these logits [..., W]."""
        clean, found = answers_of(logit(bits[:, :2].numpy().sum(1))), answers_of(logits)
        return (np.exp(clean) * (clean - found)).sum(-1).mean(-1)

    # A constant says something of the bit, and speaks for the word by itself.
    said, itself = np.linspace(-1, 2, 301)[:, None, None], np.linspace(-3, 9, 601)[None, :, None]
    alone = lost(logit(said + bits[:, 1].numpy()) + itself).min()
    together = lost(itself + np.zeros(WORDS)).min()
    assert effects["total_nats"].tolist() == pytest.approx([alone, alone], rel=0.01)
    assert pairs.item() == pytest.approx(together - 2 * alone, abs=0.003) and pairs.item() < -0.05


def answers_of(logits):
    """Log-probabilities [..., W] if one word has these logits [...], and all others 0."""
    wide = np.concatenate([logits[..., None], np.zeros((*logits.shape, WORDS - 1))], -1)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
