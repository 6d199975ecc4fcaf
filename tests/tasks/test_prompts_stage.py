"""What the prompts stage refuses, of all splits at once."""

import dataclasses

import pytest

from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.models.demo import make_tokenizer
from oacore.stages.prompts import _all_splits, _check_sizes

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
