"""What the prompts stage refuses, of all splits at once, and its look at prompts that are longer than the gate's."""

import csv
import dataclasses

import pytest

import oacore as oa
from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.models.demo import make_tokenizer
from oacore.stages import prompts as stage
from oacore.stages.prompts import _all_splits, _check_sizes

NAMES = ("Anselm", "Bettina", "Corwin", "Delphine", "Emeric", "Fenella", "Godric", "Hedwig", "Ingmar", "Jolanta")
SETTINGS = {"n_train": 4, "n_validation": 4, "n_test": 4}


def settings_of(task="ioi", **changes):
    return parse_config({"model": "demo", "tasks": {task: SETTINGS | changes}}).tasks.selected()[task]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_what_a_task_can_not_give_is_said_for_all_splits_at_once(tokenizer):
    too_many = settings_of("greater_than", n_train=100_000, n_test=100_000)
    with pytest.raises(UserError, match=r"than.n_train: 100000 wanted.*; tasks.greater_than.n_test: 100000 wanted"):
        _all_splits("greater_than", too_many, tokenizer, 0, None)


@pytest.mark.parametrize("array", ["tokens", "counterfactual", "answers", "wrong_answers"])
def test_an_id_beyond_the_models_vocabulary_is_named(tokenizer, array):
    splits = _all_splits("ioi", settings_of(), tokenizer, 0, None)
    sizes = {"max_length": 64, "d_vocab": len(tokenizer)}
    _check_sizes("ioi", splits, sizes, tokenizer)
    ids = getattr(splits["test"], array).copy()
    ids[0, 0] = len(tokenizer)
    splits["test"] = dataclasses.replace(splits["test"], **{array: ids})
    with pytest.raises(UserError, match=rf"has the id {len(tokenizer)} for .*; allowed: ids below"):
        _check_sizes("ioi", splits, sizes, tokenizer)
    with pytest.raises(UserError, match=r"longest prompt has .* tokens; allowed: 5, the model's context"):
        _check_sizes("ioi", splits, sizes | {"max_length": 5}, tokenizer)


def test_prompts_longer_than_the_gates_are_held_against_hugging_face(tmp_path, capsys, monkeypatch):
    """A learned position that only they have is wrong: the gate's 48 tokens did not reach it."""
    model = oa.load("demo", device="cpu", threads=1, cache_dir=tmp_path / "cache", results_dir=tmp_path / "results")
    assert model.facts["parity"]["longest"] == 48

    def pairs(n_words):
        with open(tmp_path / f"pairs_{n_words}.csv", "w", newline="") as file:
            rows = [(" ".join([name] * (n_words - 1) + ["the"]), "the " * n_words, name, "") for name in NAMES]
            csv.writer(file).writerows([("clean", "corrupt", "right", "wrong"), *rows])
        return oa.pairs(tmp_path / f"pairs_{n_words}.csv", model)

    loads, gated = [], stage.gated_model
    monkeypatch.setattr(stage, "gated_model", lambda *asked: loads.append(1) or gated(*asked))
    pairs(47)
    assert not loads and "longest" not in capsys.readouterr().out
    pairs(48)
    assert loads and "parity with Hugging Face" in capsys.readouterr().out

    def wrong(*asked):
        loaded = gated(*asked)
        positions = loaded.model.W_pos.clone()
        positions[48:] *= -1
        return dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, W_pos=positions))

    monkeypatch.setattr(stage, "gated_model", wrong)
    with pytest.raises(UserError, match=r"tasks.pairs_50: on its prompts of up to 51 tokens: .* differs from Hugging"):
        pairs(50)
