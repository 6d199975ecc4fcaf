"""Equal settings share a folder, different ones never do."""

import json
import shutil

import pytest

from oacore.config.read import parse_config
from oacore.store.layout import Layout, fingerprint

BASE = {"tasks": {"ioi": None, "greater_than": None}}


def layout(change=None):
    return Layout(parse_config(BASE | (change or {})))


def test_downstream_keys_share_the_cache():
    for change in (
        {"run": "b"},
        {"results_dir": "r"},
        {"ablation": {"methods": ["zero"]}},
        {"limits": {"threads": 1}},
        {"device": "cpu"},
    ):
        assert layout(change).task_dir("ioi") == layout().task_dir("ioi"), change


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bf16"}, {"demo_model": {"n_steps": 5}}, {"model": "gpt2"}, {"model": "gpt2", "revision": "main"}],
)
def test_other_models_have_other_folders(change):
    assert layout(change).model_dir != layout().model_dir
    assert layout(change).model_dir != layout({"model": "gpt2", "revision": "v1"}).model_dir


def test_other_prompts_have_other_folders():
    assert layout({"seed": 1}).model_dir == layout().model_dir
    assert layout({"seed": 1}).task_dir("ioi") != layout().task_dir("ioi")
    assert layout({"tasks": {"ioi": {"n_test": 5}}}).task_dir("ioi") != layout().task_dir("ioi")


def test_names_stay_readable_and_safe():
    assert layout({"model": "openai-community/gpt2"}).model_dir.startswith("cache/openai--community--gpt2-")
    assert layout().report == "results/demo/report.html"
    assert layout().task_of(layout().task_folders[1]) == "greater_than"


def test_fingerprint_is_of_content_not_of_place_or_time(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (first / "weights.bin").write_bytes(bytes(range(256)) * 20000)  # 5 MB: sampled
    second = tmp_path / "second"
    shutil.copytree(first, second)
    assert fingerprint(first) == fingerprint(second)
    assert layout({"model": str(first)}).model_dir.removeprefix("cache/first") == layout(
        {"model": str(second)}
    ).model_dir.removeprefix("cache/second")
    (second / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_sees_any_large_change_of_weights(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(5_000_000))
    before = fingerprint(path)
    changed = bytearray(5_000_000)
    changed[1::2] = b"\1" * 2_500_000
    path.write_bytes(changed)
    assert fingerprint(path) != before
    path.write_bytes(bytes(5_000_001))
    assert fingerprint(path) != before


def test_text_file_names_its_folder_by_content(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = layout({"tasks": {"text": {"path": str(text)}}}).task_dir("text")
    text.write_text("two")
    assert layout({"tasks": {"text": {"path": str(text)}}}).task_dir("text") != first
