"""Splits whose rows another file of the task has are copied, to the bit; others, and those of other code, are not."""

import h5py
import pytest
import torch
from conftest import random_hf

import oacore.engine.activations
from oacore.engine.activations import find_rows, write_activations, write_every_position
from oacore.errors import UserError
from oacore.models.load import canonical
from oacore.store.provenance import Provenance
from oacore.store.reader import Reader
from oacore.tasks.prompts import build

WRITERS = {"activations": write_activations, "activations-all": write_every_position}


def prompts_of(n, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 97, (4 + i % 3,), generator=draw).tolist() for i in range(n)]
    return build("text", "train", [""] * n, rows, rows, [[1]] * n, [[-1]] * n)


def splits_of(n_train=50, n_validation=7, n_test=9):
    counts = {"train": n_train, "validation": n_validation, "test": n_test}
    return {split: prompts_of(n, seed) for seed, (split, n) in enumerate(counts.items())}


def provenance_of(splits, **other):
    hashes = {split: prompts.digest() for split, prompts in splits.items()}
    noted = {"dtype": "float32", "made_by": "this"}
    return Provenance({"model_hash": "m", "prompts_hash": hashes, **other}, noted | other)


def content(path):
    with Reader(path) as reader:
        return {name: reader[name][:].tobytes() for name in reader.names}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def model(request):
    return canonical(random_hf("llama").to(torch.float32 if request.param == "fp32" else torch.bfloat16))


@pytest.mark.parametrize("name", WRITERS)
def test_only_the_split_with_another_count_is_computed(model, tmp_path, monkeypatch, name):
    """Several chunks of copied rows, too."""
    monkeypatch.setattr(oacore.engine.activations, "COPIED_ROWS", 11)
    write, paths = WRITERS[name], {kind: tmp_path / f"{kind}/{name}.h5" for kind in ("old", "new", "fresh")}
    for path in paths.values():
        path.parent.mkdir()
    write(paths["old"], model, splits_of(), provenance_of(splits_of()))
    splits = splits_of(n_test=12)
    known = find_rows([paths["old"]], provenance_of(splits))
    assert set(known) == {"train", "validation"}
    write(paths["fresh"], model, splits, provenance_of(splits))
    ran, clean_pass = [], oacore.engine.activations.clean_pass

    def counting(model, tokens, lengths):
        ran.append(len(tokens))
        return clean_pass(model, tokens, lengths)

    monkeypatch.setattr(oacore.engine.activations, "clean_pass", counting)
    write(paths["new"], model, splits, provenance_of(splits), known=known)
    assert sum(ran) == 12
    assert content(paths["new"]) == content(paths["fresh"])


@pytest.mark.parametrize("other", [{"model_hash": "n"}, {"made_by": "that"}, {"dtype": "bf16"}])
def test_rows_of_anything_else_are_not_taken(model, tmp_path, other):
    splits, path = splits_of(20), tmp_path / "activations.h5"
    write_activations(path, model, splits, provenance_of(splits, **other))
    assert find_rows([path], provenance_of(splits)) == {}


def test_a_damaged_file_is_passed_over_and_damaged_rows_are_named(model, tmp_path):
    splits, path = splits_of(20), tmp_path / "old.h5"
    provenance = provenance_of(splits)
    write_activations(path, model, splits, provenance)
    with h5py.File(path) as file:
        offset = file["test/final"].id.get_chunk_info(0).byte_offset
    whole = bytearray(path.read_bytes())
    whole[offset] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"old.h5: test/final, rows 0 to 8: damaged"):
        write_activations(tmp_path / "new.h5", model, splits, provenance, known=find_rows([path], provenance))
    assert not (tmp_path / "new.h5").exists()
    path.write_bytes(whole[:1000])
    assert find_rows([path], provenance) == {}
