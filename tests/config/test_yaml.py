"""What YAML lets through and a config must not: keys given twice, bombs, booleans for numbers, paths at home."""

from pathlib import Path

import pytest

from oacore.config.base import LARGEST
from oacore.config.read import load_config, parse_config
from oacore.errors import UserError

GOOD = {"tasks": {"ioi": {}}}
LEVELS = "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcde", "bcdef", strict=True)
)


@pytest.fixture
def load(tmp_path):
    def of(text):
        (tmp_path / "config.yaml").write_text(text)
        return load_config(tmp_path / "config.yaml")

    return of


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\ntasks: {ioi: }\nseed: 2\n", ["'seed' is first given", "line 1", "once more", "line 3"]),
        ("tasks:\n  ioi: {n_test: 5, n_test: 6}\n", ["'n_test' is first given"]),
        (f"a: &a [{'x, ' * 9}]\n{LEVELS}tasks: *f\n", ["more than 100000 values"]),
        ("tasks: &a {ioi: *a}\n", ["more than 100000 values"]),
        ("[" * 5000 + "]" * 5000, ["nested too deeply"]),
    ],
    ids=["twice", "twice inside", "bomb", "holds itself", "deep"],
)
def test_it_is_refused_with_the_file_s_name(load, text, parts):
    with pytest.raises(UserError) as error:
        load(text)
    assert all(part in str(error.value) for part in ("config.yaml", *parts)), error.value


def test_aliases_and_merged_keys_are_allowed(load):
    config = load("tasks: {ioi: &some {n_train: 20, n_test: 30}, greater_than: {<<: *some, n_test: 40}}\n")
    assert (config.tasks.greater_than.n_train, config.tasks.greater_than.n_test) == (20, 40)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"seed": True}, "seed: True: neither true nor false"),
        ({"limits": {"memory_gb": True}}, "limits.memory_gb: True"),
        ({"tasks": {"ioi": {"n_train": False}}}, "tasks.ioi.n_train: False"),
        ({"circuits": {"methods": ["ugs"], "seeds": [0, True]}}, "circuits.seeds: True"),
        ({"seed": 10**30}, f"seed: {10**30}; allowed: whole numbers up to {LARGEST}"),
        ({"circuits": True}, "circuits: True; allowed: a mapping with the keys"),
        ({"tasks": {"ioi": {"n_train": LARGEST + 1}}}, f"tasks.ioi.n_train: {LARGEST + 1}"),
    ],
)
def test_booleans_are_no_numbers_and_numbers_have_a_bound(change, start):
    with pytest.raises(UserError) as error:
        parse_config(GOOD | change)
    assert f"\n  {start}" in str(error.value)


def test_a_boolean_may_be_where_one_is_asked_for():
    circuits = {"methods": ["ugs"], "masks": {"dynamic_window": True}}
    assert parse_config(GOOD | {"circuits": circuits}).circuits.masks.dynamic_window is True
    assert parse_config(GOOD | {"seed": LARGEST}).seed == LARGEST


def test_home_is_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "facts.csv").write_text("subject,prompt,answer\nParis,Paris is in,France\n")
    (tmp_path / "text.txt").write_text("one")
    tasks = {"facts": {"path": "~/facts.csv"}, "text": {"path": "~/text.txt"}, "ioi": {}}
    truth = {"truthfulness": {"datasets": ["~/facts.csv"]}}
    config = parse_config({"tasks": tasks, "cache_dir": "~/c", "results_dir": "~/r", "lenses": truth})
    assert (config.cache_dir, config.results_dir) == (tmp_path / "c", tmp_path / "r")
    assert config.tasks.facts.path == tmp_path / "facts.csv" and config.tasks.text.path == tmp_path / "text.txt"
    assert config.lenses.truthfulness.datasets == (tmp_path / "facts.csv",)
    with pytest.raises(UserError, match=r"cache_dir: '~nobody-of-that-name/x': no such home directory"):
        parse_config(GOOD | {"cache_dir": Path("~nobody-of-that-name/x")})
