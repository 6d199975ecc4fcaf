"""Equal settings share a folder, different ones never do."""

import json
import shutil

import pytest

from oacore.config.model import SHIPPED_DEMO, DemoModel
from oacore.config.read import parse_config
from oacore.store import layout as layout_module
from oacore.store.layout import Layout

COUNTS = ("seed", "n_steps", "batch_size", "n_subjects")
SIZES = ("n_layers", "n_heads", "d_model")
RATES = ("learning_rate", "min_ioi_accuracy", "min_year_mass", "min_fact_accuracy")
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
    [{"dtype": "bf16"}, {"model": "demo-trained"}, {"model": "gpt2"}, {"model": "gpt2", "revision": "main"}],
)
def test_other_models_have_other_folders(change):
    assert layout(change).model_dir != layout().model_dir
    assert layout(change).model_dir != layout({"model": "gpt2", "revision": "v1"}).model_dir


def test_the_training_settings_name_the_folder_of_a_trained_demo_model():
    assert layout({"model": "demo-trained"}).model_dir == layout({"model": "demo-trained", "demo_model": {}}).model_dir
    folders = {
        layout({"model": "demo-trained", "demo_model": {key: value}}).model_dir
        for key, value in [
            *((key, getattr(DemoModel(), key) / 2) for key in RATES),
            *((key, 7) for key in COUNTS),
            *((key, getattr(DemoModel(), key) * 2) for key in SIZES),
        ]
    }
    assert len({*folders, layout({"model": "demo-trained"}).model_dir}) == len(DemoModel.model_fields) + 1


def test_another_shipped_demo_model_has_another_folder(tmp_path, monkeypatch):
    """Its training.json has the digests of its other files, so that any other byte of them is another cache."""
    ours = layout().model_dir
    for name in ("training.json", "config.json"):
        shutil.copy(SHIPPED_DEMO / name, tmp_path)
    monkeypatch.setattr(layout_module, "SHIPPED_DEMO", tmp_path)
    assert layout().model_dir == ours
    training = (tmp_path / "training.json").read_text()
    digest = json.loads(training)["files"]["model.safetensors"]
    (tmp_path / "training.json").write_text(training.replace(digest, "0" * 64))
    assert layout().model_dir != ours and layout({"model": "demo-trained"}).model_dir != ours


def test_other_prompts_have_other_folders():
    assert layout({"seed": 1}).model_dir == layout().model_dir
    assert layout({"seed": 1}).task_dir("ioi") != layout().task_dir("ioi")
    assert layout({"tasks": {"ioi": {"n_test": 5}}}).task_dir("ioi") != layout().task_dir("ioi")


def test_names_stay_readable_and_safe():
    assert layout({"model": "openai-community/gpt2"}).model_dir.startswith("cache/openai--community--gpt2-")
    assert layout().report == "results/demo/report.html"
    assert layout().task_of(layout().task_folders[1]) == "greater_than"


def test_text_file_names_its_folder_by_content(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = layout({"tasks": {"text": {"path": str(text)}}}).task_dir("text")
    text.write_text("two")
    assert layout({"tasks": {"text": {"path": str(text)}}}).task_dir("text") != first
