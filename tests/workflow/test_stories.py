"""A real model that nobody on this project made: stories260k (Llama family, grouped K/V) with TinyStories."""

import errno
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from oacore.config.read import parse_config
from oacore.engine.forward import logits_of, residual_after
from oacore.errors import UserError
from oacore.jobs import jobs
from oacore.models.load import load
from oacore.runner import run_stage
from oacore.store.artefacts import read_json, write_json
from oacore.store.layout import Layout


def config_of(shared_data, tmp_path, **more):
    values = {
        "run": "stories",
        "model": str(shared_data / "stories260k"),
        "device": "cpu",
        "cache_dir": str(tmp_path / "cache"),
        "results_dir": str(tmp_path / "results"),
        "tasks": {
            "text": {
                "path": str(shared_data / "text/tinystories_1000.json"),
                "n_train": 64,
                "n_validation": 32,
                "n_test": 48,
            }
        },
        "ablation": {
            "methods": ["zero", "mean", "resample", "optimal"],
            "optimal": {"first_round": 10, "max_steps": 40, "batch_size": 4},
            "components": ["head", "attention_layer", "mlp"],
        },
    }
    return parse_config(values | more)


def test_loss_is_the_published_one(shared_data):
    loaded = load(shared_data / "stories260k", device="cpu")
    passages = json.loads((shared_data / "text/tinystories_1000.json").read_text())[:60]
    total, count = 0.0, 0
    with torch.no_grad():
        for passage in passages:
            ids = loaded.tokenizer(passage, add_special_tokens=False).input_ids
            tokens = torch.tensor([[loaded.tokenizer.bos_token_id, *ids][:256]])
            log_probs = logits_of(loaded.model, residual_after(loaded.model, tokens)).log_softmax(-1)
            total -= log_probs[0, :-1].gather(1, tokens[0, 1:, None]).sum().item()
            count += tokens.shape[1] - 1
    assert total / count == pytest.approx(1.355, abs=0.01)


def test_whole_pipeline(shared_data, tmp_path):
    config = config_of(shared_data, tmp_path)
    for stage, what, output in jobs(config):
        run_stage(stage, config, **what)
        assert Path(output).is_file()
    layout = Layout(config)
    gaps = pd.read_csv(layout.ablation("text", "gaps.csv"))
    assert gaps["component"].nunique() == 5 * (8 + 1 + 1)
    wide = gaps.pivot(index="component", columns="method", values=["gap_nats", "se_nats"])
    for other in ("mean", "zero", "resample"):
        slack = 2 * (wide["se_nats"]["optimal"] ** 2 + wide["se_nats"][other] ** 2) ** 0.5
        assert (wide["gap_nats"]["optimal"] <= wide["gap_nats"][other] + slack + 1e-6).all(), other
    layers = wide["gap_nats"]["optimal"]
    assert all(layers[f"a{layer}"] > max(layers[f"a{layer}.h{head}"] for head in range(8)) for layer in range(5))
    facts = json.loads(Path(layout.model_json).read_text())
    assert facts["family"] == "llama" and facts["sizes"]["n_kv_heads"] == 4


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("ioi", ["tasks.ioi", "of 118 names as single tokens", "at least 6"]),
        ("greater_than", ["tasks.greater_than", "two tokens"]),
    ],
)
def test_tasks_that_this_model_cannot_do(shared_data, tmp_path, task, parts):
    config = config_of(shared_data, tmp_path, tasks={task: {}})
    run_stage("model", config)
    with pytest.raises(UserError) as caught:
        run_stage("prompts", config, task=task)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not list((tmp_path / "cache").rglob("prompts.h5"))


def test_windows_beyond_the_context(shared_data, tmp_path):
    text = {"path": str(shared_data / "text/tinystories_1000.json"), "n_tokens": 600}
    config = config_of(shared_data, tmp_path, tasks={"text": text})
    with pytest.raises(UserError, match=r"tasks\.text\.n_tokens: 600; allowed: up to 512"):
        run_stage("model", config)
    assert not list((tmp_path / "cache").rglob("model.json"))


@pytest.mark.parametrize("content", ["", "  \n\n \n"])
def test_empty_text(shared_data, tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    config = config_of(shared_data, tmp_path, tasks={"text": {"path": str(path)}})
    run_stage("model", config)
    with pytest.raises(UserError, match="empty\\.txt"):
        run_stage("prompts", config, task="text")


def test_a_model_changed_after_its_gate_is_refused(shared_data, tmp_path):
    config = config_of(shared_data, tmp_path).model_copy(update={"store_weights": False})
    layout = Layout(config)
    run_stage("model", config)
    write_json(layout.model_json, read_json(layout.model_json) | {"model_hash": "0" * 64})
    run_stage("prompts", config, task="text")
    with pytest.raises(UserError, match="weight hash"):
        run_stage("activations", config, task="text")


def test_full_disk_while_caching(shared_data, tmp_path, monkeypatch):
    """A write that fails with ENOSPC: one error with the path, no file left."""
    from oacore.store import writer as cache

    config = config_of(shared_data, tmp_path)
    run_stage("model", config)
    run_stage("prompts", config, task="text")

    class FullDisk(cache._Sink):
        def write(self, data):
            self.error = self.error or OSError(errno.ENOSPC, "No space left on device")
            return len(memoryview(data).cast("B"))

    monkeypatch.setattr(cache, "_Sink", FullDisk)
    with pytest.raises(UserError, match=r"activations\.h5: .*No space left on device"):
        run_stage("activations", config, task="text")
    assert [path.name for path in Path(Layout(config).task_dir("text")).iterdir()] == ["prompts.h5"]
