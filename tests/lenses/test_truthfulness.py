"""Few-shot prompts, and how often a layer is right about them."""

import csv

import numpy as np
import pytest
import torch
from conftest import random_hf

from oacore.engine.forward import logits_of, residual_after
from oacore.errors import UserError
from oacore.lenses import labelled
from oacore.lenses.constant import OptimalConstants
from oacore.lenses.labelled import Example, FewShot, few_shot, read_examples
from oacore.lenses.logit import LogitLens
from oacore.lenses.truthfulness import calibrated_accuracy, label_log_probs, truthfulness_table
from oacore.models.load import canonical

CITIES = ("Paris", "Rome", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<unk>", *CITIES, "good", "bad", "fine", "so", ":", *(f"w{i}" for i in range(40))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>", name_or_path="words")


EXAMPLES = [Example(f"{city} w{number}", ("good", "bad", "fine")[number % 3]) for number, city in enumerate(CITIES * 3)]


def shots(tokenizer, permuted, **options):
    settings = {"n_demonstrations": 6, "n_inputs": 10, "seed": 0, "max_length": 60} | options
    return few_shot(EXAMPLES, tokenizer, permuted=permuted, **settings)


def decoded(tokenizer, prompts):
    return [
        tokenizer.decode(row[1:length]).split() for row, length in zip(prompts.tokens, prompts.lengths, strict=True)
    ]


def test_permuted_prompts_differ_in_the_labels_alone(tokenizer):
    true, permuted = (shots(tokenizer, flag) for flag in (False, True))
    label_of = {example.text: example.label for example in EXAMPLES}
    assert true.labels == ("bad", "fine", "good") and len(true.tokens) == 10
    assert (true.label == permuted.label).all() and (true.lengths == permuted.lengths).all()
    stands_for = set()
    for one, other, label in zip(decoded(tokenizer, true), decoded(tokenizer, permuted), true.label, strict=True):
        assert len(one) == 6 * 3 + 2
        own = " ".join(one[-2:])
        assert label_of[own] == true.labels[label] and one[-2:] == other[-2:]
        texts = [" ".join(one[i : i + 2]) for i in range(0, 18, 3)]
        assert own not in texts and len(set(texts)) == 6, "no input is among its own demonstrations"
        assert [label_of[text] for text in texts] == one[2:18:3] and sorted(one[2:18:3]) == sorted(
            ["good", "bad", "fine"] * 2
        )
        for i in range(18):
            if i % 3 == 2:
                stands_for.add((one[i], other[i]))
            else:
                assert one[i] == other[i]
    assert len(stands_for) == 3 and all(a != b for a, b in stands_for), "a derangement, the same in every prompt"


def test_prompts_end_right_before_a_label_and_follow_the_seed(tokenizer):
    prompts = shots(tokenizer, False, template="{text} so: {label}")
    assert all(words[-2:] == ["so", ":"] for words in decoded(tokenizer, prompts))
    assert [tokenizer.decode([i]) for i in prompts.label_tokens] == list(prompts.labels)
    assert np.array_equal(shots(tokenizer, False).tokens, shots(tokenizer, False).tokens)
    assert not np.array_equal(shots(tokenizer, False).tokens, shots(tokenizer, False, seed=1).tokens)
    assert len(shots(tokenizer, False, n_inputs=1000).tokens) == len(EXAMPLES)


def test_what_can_not_be_asked_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"n_demonstrations: 6 make a prompt 21 tokens long; allowed: 20, .* so about 5"
    ):
        shots(tokenizer, False, max_length=20)
    with pytest.raises(UserError, match=r"n_demonstrations: 24; allowed: fewer than the data set's 24 examples"):
        shots(tokenizer, False, n_demonstrations=24)
    same = [Example(f"Rome w{i}", ("good so", "good bad")[i % 2]) for i in range(6)]
    with pytest.raises(UserError, match="'good bad' and 'good so' begin with the same token"):
        few_shot(same, tokenizer, n_demonstrations=2, n_inputs=2, permuted=False, seed=0, max_length=60)
    strange = [Example(f"Rome w{i}", ("good", "zebra")[i % 2]) for i in range(6)]
    with pytest.raises(UserError, match="no token for the label 'zebra'"):
        few_shot(strange, tokenizer, n_demonstrations=2, n_inputs=2, permuted=False, seed=0, max_length=60)


def test_files(tmp_path):
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("label", "text", "more"), *((example.label, example.text, "x") for example in EXAMPLES)]
        )
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(f'{{"text": "{example.text}", "label": "{example.label}"}}' for example in EXAMPLES))
    assert read_examples(path) == read_examples(lines) == EXAMPLES
    path.write_text("text,label\na,x\n,y\nc,\n")
    with pytest.raises(
        UserError, match=r"lenses.truthfulness.datasets: .*data.csv has 2 bad rows .*line 3: no text; line 4: no label"
    ):
        read_examples(path)
    lines.write_text('{"text": "a", "label": "x"}\n\nnot json\n')
    with pytest.raises(UserError, match=r"line 3: not a JSON object"):
        read_examples(lines)
    path.write_text("text,label\na,x\nb,x\nc,y\n")
    with pytest.raises(
        UserError, match=r"has the labels 'x' 2, 'y' 1; allowed: at least 2 labels, each with at least 2"
    ):
        read_examples(path)
    with pytest.raises(UserError, match="cannot read"):
        read_examples(tmp_path / "none.csv")


def by_hand(log_probs, label):
    """The definition, value by value."""
    n, k = log_probs.shape
    share = np.exp(log_probs) / np.exp(log_probs).sum(1, keepdims=True)
    found = []
    for i in range(n):
        column = np.sort(share[:, label[i]])
        threshold = column[int(np.floor((k - 1) / k * (n - 1) + 1e-9))]
        own = share[i, label[i]]
        found.append(1 / k if np.isclose(own, threshold, rtol=1e-5, atol=0) else float(own > threshold))
    return np.array(found)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_calibrated_accuracy(k):
    draw = np.random.default_rng(k)
    label = np.arange(60) % k
    log_probs = draw.standard_normal((60, k)) + 2 * np.eye(k)[label]
    found = calibrated_accuracy(torch.from_numpy(log_probs), torch.from_numpy(label))
    assert np.allclose(found, by_hand(log_probs, label)) and found.mean() > 0.6
    constant = calibrated_accuracy(torch.tensor(draw.standard_normal(k)).expand(60, k), torch.from_numpy(label))
    assert torch.allclose(constant, torch.tensor(1 / k, dtype=torch.float64)), (
        "who tells nothing apart is right by chance"
    )
    perfect = calibrated_accuracy(
        torch.from_numpy(50 * np.eye(k)[label] + 0.01 * draw.standard_normal((60, k))), torch.from_numpy(label)
    )
    wrong = calibrated_accuracy(
        torch.from_numpy(-50 * np.eye(k)[label] + 0.01 * draw.standard_normal((60, k))), torch.from_numpy(label)
    )
    assert perfect.mean() > 0.95 and wrong.mean() < 0.05


def test_every_lens_at_every_layer_and_the_model_at_the_last():
    model = canonical(random_hf("gpt2"))
    draw = np.random.default_rng(0)
    tokens, lengths = draw.integers(1, 97, (12, 9)).astype(np.int32), draw.integers(3, 10, 12).astype(np.int32)
    lengths[0] = 9
    label = draw.integers(0, 3, 12).astype(np.int32)
    prompts = FewShot(tokens, lengths, label, np.array([4, 9, 30], np.int32), ("a", "b", "c"))
    lenses = [
        LogitLens("logit", "", model, {}),
        OptimalConstants("oca", "", model, {"constants": torch.ones(3, 3, 32)}),
    ]
    both = {("set", name): prompts for name in ("true", "permuted")}
    log_probs = {name: label_log_probs(model, lenses, shots, 30) for name, shots in both.items()}
    table = truthfulness_table(lenses, both, log_probs)
    assert len(table) == 2 * 2 * 4 and set(table["layer"]) == {0, 1, 2, 3} and (table["n"] == 12).all()
    whole = torch.from_numpy(tokens).long()
    for layer in range(4):
        at_last = residual_after(model, whole, layer)[torch.arange(12), torch.from_numpy(lengths).long() - 1]
        for lens in lenses:
            logits = logits_of(model, at_last) if layer == 3 else lens.logits(at_last, layer)
            values = by_hand(logits.log_softmax(-1)[:, [4, 9, 30]].double().numpy(), label)
            row = table[(table["lens"] == lens.name) & (table["layer"] == layer)].iloc[0]
            assert row["accuracy"] == pytest.approx(values.mean()) and row["se"] == pytest.approx(
                values.std(ddof=1) / 12**0.5
            )


def test_the_demo_has_labels_of_its_own(tmp_path):
    from oacore.config.model import DemoModel
    from oacore.models import demo

    facts = demo.facts(DemoModel().n_subjects, 0)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *(fact[1:3] for fact in facts if fact.relation == "lives in")])
    prompts = few_shot(
        labelled.read_examples(tmp_path / "labels.csv"),
        demo.make_tokenizer(),
        n_demonstrations=4,
        n_inputs=20,
        permuted=True,
        seed=0,
        max_length=64,
    )
    assert len(prompts.tokens) == 20 and len(prompts.labels) == 10
