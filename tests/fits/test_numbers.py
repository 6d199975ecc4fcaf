"""Numbers that stay what they are: nothing that is not finite goes unseen, memory and batch sizes change nothing."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_mask_learning import Setting

from oacore import runner
from oacore.circuits.learn import Knob
from oacore.circuits.passes import Passes
from oacore.circuits.ugs import UniformSampler
from oacore.config.base import OptimalFit
from oacore.config.circuits import MaskFit
from oacore.config.read import parse_config
from oacore.errors import UserError
from oacore.fits.descent import descend
from oacore.fits.resume import Resumable
from oacore.runner import run_stage
from oacore.store.layout import Layout
from oacore.store.reader import Reader

START = torch.ones(3, 2)
SETTINGS = OptimalFit(first_round=10, max_steps=150, tolerance=1e-6)


def quadratic(running, values, step):
    return 2 * values


def validate(running, values):
    return values.square().sum(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_the_fit(tmp_path, bad):
    """The first bad step is named, though the device is asked only at the convergence test; the checkpoint is the last
    good one.
    """
    checkpoint = tmp_path / "checkpoint.safetensors"

    def breaks(running, values, step):
        gradient = quadratic(running, values, step)
        if step >= 12:
            gradient[1, 0] = bad
        return gradient

    kept = rf"last good checkpoint: .*{checkpoint.name}, step 10"
    named = rf"step 13: not finite: gradient of b; {kept}; allowed: a smaller the\.rate, now 0.2"
    with pytest.raises(UserError, match=named):
        descend(
            START,
            torch.ones(1, 1),
            breaks,
            validate,
            SETTINGS,
            names="abc",
            key="the.rate",
            resumable=Resumable(checkpoint, "x"),
        )
    state = Resumable(checkpoint, "x").load()
    assert int(state["step"]) == 10
    assert all(value.isfinite().all() for value in state.values())
    whole = descend(START, torch.ones(1, 1), quadratic, validate, SETTINGS, names="abc", key="the.rate")
    resumed = descend(
        START,
        torch.ones(1, 1),
        quadratic,
        validate,
        SETTINGS,
        names="abc",
        key="r",
        resumable=Resumable(checkpoint, "x"),
    )
    assert torch.equal(whole.best, resumed.best)


def test_a_loss_that_is_not_finite_stops_the_fit():
    def breaks(running, values):
        losses = validate(running, values)
        return torch.where(running.index == 2, losses * (math.nan if values.max() < 0.5 else 1), losses)

    with pytest.raises(UserError, match=r"step \d+: not finite: validation loss of c; last good checkpoint: none"):
        descend(START, torch.ones(1, 1), quadratic, breaks, SETTINGS, names="abc", key="the.rate")


@pytest.mark.parametrize("group", ["masks", "constants"])
def test_mask_learning_names_the_parameters(tmp_path, monkeypatch, group):
    setting, checkpoint, calls = Setting(), tmp_path / "checkpoint.safetensors", []
    found = Passes.gradients

    def breaks(self, *arguments, **options):
        gradients = found(self, *arguments, **options)
        calls.append(None)
        if len(calls) == 7:
            getattr(gradients, group)[0] = math.nan
        return gradients

    monkeypatch.setattr(Passes, "gradients", breaks)
    settings = MaskFit(n_steps=20, n_samples=2, n_prompts=3, record_every=5)
    with pytest.raises(
        UserError, match=r"step 7: not finite: gradient of .*last good checkpoint: .*checkpoint\.safetensors, step 5"
    ) as info:
        setting.learn(
            UniformSampler(), [Knob(1e-2, 3)], "optimal", settings=settings, resumable=Resumable(checkpoint, "x")
        )
    assert "masks 0.01 (seed 3)" in str(info.value)
    assert ("constants/" in str(info.value)) == (group == "constants")


def instead_of_gaps(monkeypatch, run):
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    monkeypatch.setattr(runner, "_check_inputs", lambda config, inputs: None)


def fake_stage(monkeypatch, needs):
    """A stage that runs out of memory above `needs` tokens at once; the sizes that it was tried with."""
    tried = []

    def run(config, inputs, outputs, task):
        tried.append((config.limits.tokens_per_batch, config.limits.memory_gb))
        if config.limits.tokens_per_batch > needs:
            raise torch.OutOfMemoryError("CUDA out of memory")

    instead_of_gaps(monkeypatch, run)
    return tried


def test_out_of_memory_halves_the_batches(monkeypatch, capsys):
    config = parse_config({"model": "demo", "tasks": {"ioi": {}}, "limits": {"tokens_per_batch": 4096, "memory_gb": 8}})
    tried = fake_stage(monkeypatch, needs=1500)
    run_stage("gaps", config, task="ioi")
    assert tried == [(4096, 8), (2048, 4), (1024, 2)]
    assert "gaps: out of memory; again with limits.tokens_per_batch 1024" in capsys.readouterr().err


def test_out_of_memory_with_the_smallest_batch_is_an_error(monkeypatch):
    config = parse_config({"model": "demo", "tasks": {"ioi": {}}, "limits": {"tokens_per_batch": 256}})
    tried = fake_stage(monkeypatch, needs=0)
    with pytest.raises(UserError, match=r"gaps: out of memory with limits\.tokens_per_batch 64; allowed: "):
        run_stage("gaps", config, task="ioi")
    assert [size for size, _ in tried] == [256, 128, 64]


def test_other_errors_are_not_taken_for_it(monkeypatch):
    def run(config, inputs, outputs, task):
        raise RuntimeError("shapes do not match")

    instead_of_gaps(monkeypatch, run)
    with pytest.raises(RuntimeError, match="shapes"):
        run_stage("gaps", parse_config({"model": "demo", "tasks": {"ioi": {}}}), task="ioi")


MEASURED = {
    "activations": {"task": "ioi"},
    "gaps": {"task": "ioi"},
    "tracing": {"task": "facts"},
    "lens_evaluation": {"task": "text"},
    "lens_faithfulness": {"task": "text"},
    "lens_truthfulness": {"task": "text"},
    "circuits": {"task": "ioi", "method": "hcgs", "ablation": "counterfactual"},
}
VARIES = ("fit_seconds", "peak_mb")  # from run to run


def test_other_batch_sizes_give_the_same_numbers(tiny_run, own_copy):
    """Every stage that measures, with batches of a few rows, within 2e-5 of the tables made with batches of thousands
    of tokens.
    """
    theirs, config = Layout(tiny_run[0]), own_copy
    small = config.model_copy(
        update={"limits": config.limits.model_copy(update={"tokens_per_batch": 70, "memory_gb": 0.004})}
    )
    ours = Layout(small)
    for stage, what in MEASURED.items():
        run_stage(stage, small, **what)
    with Reader(ours.activations("ioi")) as new, Reader(theirs.activations("ioi")) as old:
        assert new.names == old.names
        for name in new.names:
            scale = max(1.0, float(np.abs(old[name][:]).max()))
            np.testing.assert_allclose(new[name][:], old[name][:], rtol=0, atol=1e-6 * scale, err_msg=name)
    methods = [f"{method}-counterfactual/pareto" for method in small.circuits.methods]
    tables = {
        layout: [
            layout.ablation("ioi", "gaps.csv"),
            layout.tracing("facts", "aie.csv"),
            layout.tracing("facts", "pictures.csv"),
        ]
        + [
            layout.lens("text", f"{name}.csv")
            for name in ("loss", "lengths", "truthfulness", "pictures", "faithfulness")
        ]
        + [layout.circuits("ioi", f"{name}.csv") for name in methods]
        for layout in (ours, theirs)
    }
    for mine, other in zip(tables[ours], tables[theirs], strict=True):
        new, old = (
            pd.read_csv(path, keep_default_na=False).drop(columns=VARIES, errors="ignore") for path in (mine, other)
        )
        assert list(new.columns) == list(old.columns)
        for column in new:
            if pd.api.types.is_float_dtype(old[column]):
                within = (
                    {"rtol": 0, "atol": 0.02} if column == "top1_agreement" else {"rtol": 1e-4, "atol": 2e-5}
                )  # a tie of 60 prompts
                np.testing.assert_allclose(new[column], old[column], **within, err_msg=f"{mine} {column}")
            else:
                assert (new[column] == old[column]).all(), f"{mine} {column}"
