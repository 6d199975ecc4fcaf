"""What a cache holds, who needs it, and its removal."""

from pathlib import Path

import pytest
import yaml

from oacore.__main__ import main
from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.store.housekeeping import pieces, remove, table, write_needed
from oacore.store.items import FOLDER, Item, Items
from oacore.store.layout import Layout
from oacore.store.locks import hold


def config(root, run, n_test=8, dtype="fp32"):
    places = {"cache_dir": str(root / "cache"), "results_dir": str(root / "results")}
    tasks = {"ioi": {"n_train": 8, "n_validation": 8, "n_test": n_test}}
    return parse_config({"run": run, "model": "demo", "dtype": dtype, "tasks": tasks} | places)


def made(config, numbers):
    """A run of a config by hand: model, prompts, and items of which its list has these numbers."""
    layout = Layout(config)
    for path in (layout.model_json, layout.prompts("ioi")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("x" * 1000)
    items = Items(Path(layout.model_dir) / FOLDER / "ioi", "circuits", {})
    wanted = [{"number": number} for number in numbers]
    items.get(wanted, lambda new: [Item({}) for _ in new])
    write_needed(Path(layout.circuits("ioi", "ugs-optimal/search.safetensors")), [items.path(own) for own in wanted])
    return layout, [items.path(own) for own in wanted]


@pytest.fixture
def runs(tmp_path):
    """Two runs that share item 2; a third of other prompts; a fourth of another model."""
    settings = (("a", {}), ("b", {}), ("c", {"n_test": 9}), ("d", {"dtype": "bf16"}))
    numbers = ([1, 2], [2, 3], [4], [5])
    configs = [config(tmp_path, run, **rest) for run, rest in settings]
    return configs, [made(each, of_run) for each, of_run in zip(configs, numbers, strict=True)]


def test_what_no_config_of_the_list_needs_goes_and_nothing_else(runs):
    configs, ((layout, of_a), (_, of_b), (of_c, items_c), (of_d, _)) = runs
    found = pieces(configs[:2])
    unneeded = {piece.path for piece in found if not piece.needed}
    assert unneeded == {Path(of_c.task_dir("ioi")), *items_c, Path(of_d.model_dir)}
    assert remove(found) > 2000
    kept = [layout.model_json, layout.prompts("ioi"), *of_a, *of_b]
    assert all(Path(path).exists() for path in kept) and not any(path.exists() for path in unneeded)
    assert not [piece for piece in pieces(configs[:2]) if not piece.needed]
    remove(pieces(configs[:1]))
    assert not of_b[1].exists() and all(path.exists() for path in of_a)


def test_nothing_goes_while_a_run_is_at_work(runs):
    configs, ((layout, _), *_) = runs
    lock = hold(f"{layout.model_dir}/.jobs.lock", "a job", shared=True)
    before = sorted(Path(layout.model_dir).rglob("*.safetensors"))
    with pytest.raises(UserError, match="held by"):
        remove(pieces(configs[:1]))
    lock.close()
    assert sorted(Path(layout.model_dir).rglob("*.safetensors")) == before


def test_a_config_that_was_not_run_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="results/new: no list of what it needs"):
        pieces([runs[0][0], config(tmp_path, "new")])


def test_the_command_lists_and_removes_when_told(runs, tmp_path, capsys):
    names = []
    for each in runs[0][:2]:
        names.append(str(tmp_path / f"{each.run}.yaml"))
        Path(names[-1]).write_text(yaml.safe_dump(each.model_dump(mode="json")))
    assert main(["cache", *names]) == 0
    listed = capsys.readouterr().out
    assert listed.count("unneeded") == 3 and "ioi circuits" in listed and "removed" not in listed
    of_runs = {line.partition("  run ")[2]: int(line.split()[0]) for line in listed.splitlines() if "  run " in line}
    assert of_runs == {"a": 3, "a alone": 1, "b": 3, "b alone": 1}, "two items, one of them shared, and prompts"
    assert listed.strip() == table(pieces(runs[0][:2])).strip()
    assert main(["cache", *names, "--remove"]) == 0
    assert "removed 0.0 MB" in capsys.readouterr().out
    assert main(["cache", *names]) == 0 and "unneeded" not in capsys.readouterr().out
