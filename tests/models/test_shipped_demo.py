"""The demo model that is shipped: whole, of today's language and settings, and as good as it says."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from oacore import inputs
from oacore.config.model import SHIPPED_DEMO, DemoModel
from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.models import demo
from oacore.models.hub import load_hugging_face, load_tokenizer
from oacore.store.artefacts import digest_of_file, read_json

ROOT = Path(__file__).parents[2]
ANEW = "train and ship it anew: python -m oacore.models.demo"


@pytest.fixture(scope="module")
def training():
    return read_json(SHIPPED_DEMO / "training.json")


def test_its_files_are_those_of_its_training(training):
    files = {path.name: digest_of_file(path) for path in SHIPPED_DEMO.iterdir() if path.name != "training.json"}
    assert files == training["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "facts.csv", "labels.csv", "text.json"} <= set(files)


def test_it_was_trained_with_the_default_settings(training):
    assert training["settings"] == DemoModel().model_dump(), ANEW


def test_its_language_is_that_of_the_code(tmp_path):
    """Whoever changes a template, a name or a fact ships another model with it."""
    demo.write_data(tmp_path, DemoModel())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED_DEMO / path.name).read_bytes(), f"{path.name}: {ANEW}"
    shipped, ours = load_tokenizer(SHIPPED_DEMO), demo.make_tokenizer()
    assert shipped.get_vocab() == ours.get_vocab(), ANEW
    sentence = "When Mary and Tyler went to the garden, the war lasted from the year 1743 to the year 17"
    assert shipped(sentence).input_ids == ours(sentence).input_ids


def test_it_is_as_good_as_it_says(training):
    """Measured anew. On another CPU an answer may change that is as likely as another one, the mass in its last
    digits.
    """
    model, tokenizer, settings = load_hugging_face(SHIPPED_DEMO), load_tokenizer(SHIPPED_DEMO), DemoModel()
    measured = demo.measure(model, tokenizer, settings)
    assert measured["year_mass"] == pytest.approx(training["held_out"]["year_mass"], abs=1e-5)
    for name, answers in (("ioi_accuracy", 500), ("fact_accuracy", 2 * settings.n_subjects)):
        assert measured[name] == pytest.approx(training["held_out"][name], abs=1.5 / answers), name
    for name, value in measured.items():
        assert value >= getattr(settings, f"min_{name}")


def test_nothing_in_it_is_of_the_machine_that_made_it():
    def texts(value):
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        return [text for item in value for text in texts(item)] if isinstance(value, list) else [value]

    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "training.json"):
        for text in texts(json.loads((SHIPPED_DEMO / name).read_text())):
            assert not (isinstance(text, str) and "/" in text), f"{name}: {text}"
    assert b"/" not in (SHIPPED_DEMO / "model.safetensors").read_bytes()[:4096], "its header"


def test_it_is_small_and_in_the_package():
    sizes = {path.name: path.stat().st_size for path in SHIPPED_DEMO.iterdir()}
    assert sum(sizes.values()) < 5e6
    assert sum(size for name, size in sizes.items() if name.endswith((".csv", "text.json"))) < 1.5e6
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["oacore.models"] for path in (ROOT / "oacore/models").glob(pattern)}
    assert packaged == {*SHIPPED_DEMO.iterdir()}


def test_a_damaged_file_of_it_is_refused_by_name(tmp_path, monkeypatch):
    shutil.copytree(SHIPPED_DEMO, tmp_path / "demo")
    monkeypatch.setattr(inputs, "SHIPPED_DEMO", tmp_path / "demo")
    config, anywhere = parse_config({"model": "demo", "tasks": {"ioi": {}}}), Path("model.json")
    assert inputs.model_source(config, anywhere) == str(tmp_path / "demo")
    (tmp_path / "demo" / "facts.csv").write_text("subject,prompt,answer\n")
    with pytest.raises(UserError, match=r"demo/facts\.csv: missing, damaged or edited, .*; install oacore anew"):
        inputs.model_source(config, anywhere)
