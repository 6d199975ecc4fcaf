"""Loops that keep their state: stopped anywhere, they go on to the same bits."""

import numpy as np
import pytest
import torch
from test_mask_learning import Setting

from oacore import gaps as gaps_module
from oacore import resume
from oacore.ablation import components_of
from oacore.circuits import acdc as acdc_module
from oacore.gaps import evaluate
from oacore.resume import Kept


class StoppedError(Exception):
    pass


def stopping(function, calls):
    """The function, until it has been called that often."""
    left = [calls]

    def called(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError
        return function(*arguments, **options)

    return called


@pytest.fixture
def every_part(monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0.0)


def test_nothing_is_kept_before_its_time(tmp_path):
    kept = Kept(tmp_path / "state.safetensors", "x")
    kept.save({"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
    Kept(None).save({"a": torch.zeros(1)})


def test_another_identity_is_not_taken_up(tmp_path, every_part):
    Kept(tmp_path / "state.safetensors", "x").save({"a": torch.ones(1)})
    assert Kept(tmp_path / "state.safetensors", "x").load() == {"a": torch.ones(1)}
    assert Kept(tmp_path / "state.safetensors", "y").load() is None


@pytest.mark.parametrize("calls", [5, 14, 31])  # of 36: four batches of nine
def test_gaps_go_on(tmp_path, monkeypatch, every_part, calls):
    setting = Setting()
    components = components_of(setting.model, ("mlp",))

    def run(kept=None):
        methods = ("mean", "resample", "gaussian")
        given = (setting.model, components, methods, setting.statistics, {}, setting.batch, setting.other)
        return evaluate(*given, tokens_per_batch=18, kept=kept, what="")

    whole, kl = run(), gaps_module.kl_divergence
    monkeypatch.setattr(gaps_module, "kl_divergence", stopping(kl, calls))
    with pytest.raises(StoppedError):
        run(Kept(tmp_path / "state.safetensors", "x"))
    monkeypatch.setattr(gaps_module, "kl_divergence", stopping(kl, 36 - 9 * (calls // 9)))  # what is left, and no more
    resumed = run(Kept(tmp_path / "state.safetensors", "x"))
    assert all(torch.equal(resumed[method], whole[method]) for method in whole)


@pytest.mark.parametrize("calls", [3, 20])
def test_acdc_goes_on(tmp_path, monkeypatch, every_part, calls):
    setting = Setting()
    chosen = torch.arange(3)

    def run(kept=None):
        return acdc_module.acdc(setting.passes(), setting.replacements("mean"), [1e-4, 1e-2], chosen, "kl", kept=kept)

    whole, found = run(), acdc_module.Passes.losses
    monkeypatch.setattr(acdc_module.Passes, "losses", stopping(found, calls))
    with pytest.raises(StoppedError):
        run(Kept(tmp_path / "state.safetensors", "x"))
    monkeypatch.setattr(acdc_module.Passes, "losses", found)
    resumed = run(Kept(tmp_path / "state.safetensors", "x"))
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))
