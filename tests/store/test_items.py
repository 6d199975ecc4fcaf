"""The store of finished items: what is found, what is computed, and what neither damage nor company can change."""

import errno
import os
import threading
import time

import pytest
import torch

from oacore.store import items as items_module
from oacore.store.items import Item, Items

SHARED = {"model_hash": "m", "settings": {"n_steps": 3}}


class Work:
    """Doubles numbers, and remembers which."""

    def __init__(self, items, numbers):
        self.items, self.numbers, self.computed = items, numbers, []

    def get(self, what=""):
        return self.items.get([{"number": number} for number in self.numbers], self.compute, what)

    def compute(self, new):
        self.computed += [self.numbers[index] for index in new]
        return [
            Item({"twice": torch.tensor([2.0 * self.numbers[index]])}, {"of": (self.numbers[index], 0.1)})
            for index in new
        ]


@pytest.fixture
def items(tmp_path):
    return Items(tmp_path / "items", "doubles", SHARED, {"run": "first"})


def values(found):
    return [float(item.tensors["twice"]) for item in found]


def test_only_what_is_new_is_computed_and_in_the_order_asked_for(items):
    first, longer, other = Work(items, [1, 2]), Work(items, [3, 2, 1, 4]), Work(items, [4, 1])
    assert values(first.get()) == [2, 4] and first.computed == [1, 2]
    assert values(longer.get()) == [6, 4, 2, 8] and longer.computed == [3, 4]
    assert values(other.get()) == [8, 2] and other.computed == []


def test_a_new_item_is_given_as_it_will_be_read(items):
    (new,), (read,) = Work(items, [1]).get(), Work(items, [1]).get()
    assert new.facts == read.facts == {"of": [1, 0.1]} and new.noted == read.noted
    assert torch.equal(new.tensors["twice"], read.tensors["twice"])
    assert set(new.noted) == {"run", "seconds", "peak_mb"} and new.noted["seconds"] >= 0 < new.noted["peak_mb"]


@pytest.mark.parametrize("change", [{"settings": {"n_steps": 4}}, {"model_hash": "n"}, {"code": "c"}])
def test_whatever_determines_an_item_makes_another_of_it(items, change):
    Work(items, [1]).get()
    other = Work(Items(items.folder, items.kind, SHARED | change), [1])
    other.get()
    assert other.computed == [1]
    same = Work(Items(items.folder, items.kind, dict(reversed(SHARED.items())), {"run": "second"}), [1])
    same.get()
    assert same.computed == [], "neither the order of settings nor the name of the run"


@pytest.mark.parametrize("damage", ["cut", "flipped", "another's"])
def test_a_damaged_item_is_computed_again_and_said_so(items, damage, capsys):
    Work(items, [1, 2]).get()
    path, other = items.path({"number": 1}), items.path({"number": 2})
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "flipped":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case _:
            path.write_bytes(other.read_bytes())
    again = Work(items, [1, 2])
    assert values(again.get()) == [2, 4] and again.computed == [1]
    assert f"warning: {path}: " in capsys.readouterr().err and path.read_bytes() != content[:-1]
    healed = Work(items, [1, 2])
    assert values(healed.get()) == [2, 4] and healed.computed == []


def test_what_fails_stores_nothing(items):
    def compute(new):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        items.get([{"number": 1}], compute)
    assert not list(items.folder.rglob("*.safetensors"))


def test_what_is_yielded_is_stored_before_the_next_is_computed(items):
    wanted = [{"number": number} for number in range(3)]

    def compute(new):
        for index in new:
            if index == 2:
                raise KeyboardInterrupt
            time.sleep(0.01 * (index + 1))
            yield Item({}, {"number": index})

    with pytest.raises(KeyboardInterrupt):
        items.get(wanted, compute)
    asked = []
    found = items.get(wanted, lambda new: asked.extend(new) or [Item({}, {"number": index}) for index in new])
    assert asked == [2] and [item.facts["number"] for item in found] == [0, 1, 2]
    assert 0.01 <= found[0].noted["seconds"] < found[1].noted["seconds"], "each its own"


def test_who_only_looks_computes_nothing(items):
    wanted = [{"number": number} for number in range(4)]
    items.get(wanted[:2], lambda new: [Item({}) for _ in new])
    with items_module.only_looking():
        items.get(wanted[:2], lambda new: pytest.fail("these are there"))
        with pytest.raises(items_module.NotStoredError, match="numbers: 2 of 4 are new: 2, 3") as caught:
            items.get(wanted, lambda new: pytest.fail("it only looks"), "numbers")
    assert caught.value.n_new == 2 and caught.value.seconds == pytest.approx(0, abs=1)
    other = Items(items.folder, "others", items.shared)
    with items_module.only_looking(), pytest.raises(items_module.NotStoredError) as caught:
        other.get(wanted, lambda new: pytest.fail("it only looks"))
    assert caught.value.seconds is None, "nothing like them is there"
    assert len(items.get(wanted, lambda new: [Item({}) for _ in new])) == 4


def test_the_line_names_what_is_new(items, capsys):
    Work(items, [1, 2]).get("doubles")
    Work(items, [1, 2]).get("doubles")
    Work(items, [1, 2, 3, 4, 5, 6, 7, 8]).get("doubles")
    items.get([{"lambda": 2e-4, "seed": 1, "mask": "0123456789ab", "start": None}], lambda new: [Item({})], "circuits")
    assert capsys.readouterr().out.splitlines() == [
        "doubles: 2 of 2 are new: 1, 2",
        "doubles: all 2 are in the store",
        "doubles: 6 of 8 are new: 3, 4, 5, 6, and 2 more",
        "circuits: 1 of 1 are new: 0.0002 1",
    ]


def test_many_writers_of_the_same_items(items):
    """Whoever is last, whole files are what there is."""
    failed = []

    def work():
        try:
            assert values(Work(items, list(range(20))).get()) == [2.0 * number for number in range(20)]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    last = Work(items, list(range(20)))
    assert values(last.get()) == [2.0 * number for number in range(20)] and last.computed == []
    assert len(list(items.folder.rglob("*"))) == len({path.parent for path in items.folder.rglob("*.safetensors")}) + 21


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_store_of_others_is_read_and_not_written(items, error, monkeypatch, capsys):
    Work(items, [1]).get()
    monkeypatch.setattr(items_module, "write_tensors", refusing(error))
    work = Work(items, [1, 2])
    assert values(work.get()) == [2, 4] and work.computed == [2]
    assert "not stored: " in capsys.readouterr().err


def test_a_full_disk_is_an_error(items, monkeypatch):
    monkeypatch.setattr(items_module, "write_tensors", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        Work(items, [1]).get()


def refusing(error):
    def write(path, *_):
        raise OSError(error, os.strerror(error), str(path))

    return write
