"""Every byte of a model or a data file counts, and large files are hashed once."""

import json
import os
import shutil

import pytest

from oacore.store import fingerprint as module
from oacore.store.fingerprint import REMEMBERED_FROM, fingerprint


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """Of this test alone; files that were just written are remembered too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(module, "SETTLED", 0.0)
    return tmp_path / "user/oacore/fingerprints.json"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20000)
    return folder


def test_it_is_of_content_not_of_place_or_time(model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    os.utime(other / "weights.bin", (1, 1))
    (other / ".hidden").write_text("anything")
    assert fingerprint(model) == fingerprint(other)
    (other / "config.json").rename(other / "settings.json")
    assert fingerprint(model) != fingerprint(other), "names count"
    assert fingerprint(model / "weights.bin") == fingerprint(other / "weights.bin"), "but not that of a single file"


@pytest.mark.parametrize("at", [0, 70_001, 2_500_000, -1])
def test_one_edited_byte_is_seen_even_where_the_time_is_set_back(model, at):
    path = model / "weights.bin"
    before, times = fingerprint(model), path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    edited = path.stat()
    assert (edited.st_mtime_ns, edited.st_size) == (times.st_mtime_ns, times.st_size)
    assert fingerprint(model) != before
    content[at] ^= 1
    path.write_bytes(content)
    assert fingerprint(model) == before


def test_large_files_are_remembered_and_small_ones_are_not(model, memory):
    before = fingerprint(model)
    known = json.loads(memory.read_text())
    assert list(known) == [str(model / "weights.bin")]
    known[str(model / "weights.bin")][-1] = "0" * 64
    memory.write_text(json.dumps(known))
    assert fingerprint(model) != before, "the remembered hash was taken"
    (model / "weights.bin").write_bytes(bytes(REMEMBERED_FROM - 1))
    (model / "more.bin").write_bytes(bytes(REMEMBERED_FROM))
    fingerprint(model)
    assert list(json.loads(memory.read_text())) == [str(model / "weights.bin"), str(model / "more.bin")]
    assert json.loads(memory.read_text())[str(model / "weights.bin")][-1] == "0" * 64, "of before: too small since"


def test_files_that_are_gone_are_forgotten(model, memory):
    fingerprint(model)
    (model / "weights.bin").rename(model / "other.bin")
    fingerprint(model)
    assert list(json.loads(memory.read_text())) == [str(model / "other.bin")]


def test_a_file_that_was_just_written_is_not_remembered(model, memory, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 60.0)
    fingerprint(model)
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"a": 1}', "3"])
def test_a_damaged_memory_heals(model, memory, damage):
    before = fingerprint(model)
    memory.write_text(damage)
    assert fingerprint(model) == before
    assert list(json.loads(memory.read_text())) == [str(model / "weights.bin")]


def test_without_a_place_to_remember_it_warns_and_hashes(model, memory, tmp_path, capsys):
    before = fingerprint(model)
    shutil.rmtree(tmp_path / "user")
    (tmp_path / "user").write_text("a file")
    assert fingerprint(model) == before
    assert "can't remember" in capsys.readouterr().err
