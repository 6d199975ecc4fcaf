"""Loops that keep their state: stopped anywhere, they go on to the same bits."""

import numpy as np
import pytest
import torch
from test_mask_learning import Setting

from oacore.ablation import gaps as gaps_module
from oacore.ablation.components import components_of
from oacore.ablation.gaps import evaluate
from oacore.circuits import acdc as acdc_module
from oacore.circuits.eap import eap_ig_scores
from oacore.circuits.exact import exact_scores
from oacore.fits import resume
from oacore.fits.resume import NOT_KEPT, Resumable


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
    kept = Resumable(tmp_path / "state.safetensors", "x")
    kept.save_sometimes({"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
    NOT_KEPT.save({"a": torch.zeros(1)})
    assert NOT_KEPT.load() is None


def test_the_state_goes_when_the_result_is_safe_and_stays_after_an_error(tmp_path):
    def work(fails):
        with Resumable(tmp_path / "state.safetensors", "x") as kept:
            for resumable in (kept, kept.part("first"), kept.part("second", 3)):
                resumable.save({"a": torch.ones(1)})
            if fails:
                raise StoppedError

    with pytest.raises(StoppedError):
        work(fails=True)
    names = {"state.safetensors", "state-first.safetensors", "state-second.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    again = Resumable(tmp_path / "state.safetensors", "x")
    assert again.part("second", 3).load() == {"a": torch.ones(1)} and again.part("second", 4).load() is None
    work(fails=False)
    assert not list(tmp_path.iterdir())


def test_another_identity_is_not_taken_up(tmp_path, every_part):
    Resumable(tmp_path / "state.safetensors", "x").save({"a": torch.ones(1)})
    assert Resumable(tmp_path / "state.safetensors", "x").load() == {"a": torch.ones(1)}
    assert Resumable(tmp_path / "state.safetensors", "y").load() is None


@pytest.mark.parametrize("calls", [5, 14, 31])  # of 36: four batches of nine
def test_gaps_go_on(tmp_path, monkeypatch, every_part, calls):
    setting = Setting()
    components = components_of(setting.model, ("mlp",))

    def run(resumable=NOT_KEPT):
        methods = ("mean", "resample", "gaussian")
        given = (setting.model, components, methods, setting.statistics, {}, setting.batch, setting.other)
        return evaluate(*given, tokens_per_batch=18, resumable=resumable, what="")

    whole, kl = run(), gaps_module.kl_divergence
    monkeypatch.setattr(gaps_module, "kl_divergence", stopping(kl, calls))
    with pytest.raises(StoppedError):
        run(Resumable(tmp_path / "state.safetensors", "x"))
    monkeypatch.setattr(gaps_module, "kl_divergence", stopping(kl, 36 - 9 * (calls // 9)))  # what is left, and no more
    resumed = run(Resumable(tmp_path / "state.safetensors", "x"))
    assert all(torch.equal(resumed[method], whole[method]) for method in whole)


@pytest.mark.parametrize("calls", [3, 20])
def test_acdc_goes_on(tmp_path, monkeypatch, every_part, calls):
    setting = Setting()
    chosen = torch.arange(3)

    def run(resumable=NOT_KEPT):
        return acdc_module.acdc(
            setting.passes(), setting.replacements("mean"), [1e-4, 1e-2], chosen, "kl", resumable=resumable
        )

    whole, found = run(), acdc_module.Passes.losses
    monkeypatch.setattr(acdc_module.Passes, "losses", stopping(found, calls))
    with pytest.raises(StoppedError):
        run(Resumable(tmp_path / "state.safetensors", "x"))
    monkeypatch.setattr(acdc_module.Passes, "losses", found)
    resumed = run(Resumable(tmp_path / "state.safetensors", "x"))
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))


@pytest.mark.parametrize("done", [1, 3])
@pytest.mark.parametrize("method", ["eap_ig", "exact"])
def test_scores_go_on(tmp_path, monkeypatch, every_part, capsys, method, done):
    setting, kept = Setting(), Resumable(tmp_path / "state.safetensors", "x")
    # Of exact scores the first pass is the clean run's.
    counted, before = {"eap_ig": ("gradients", 0), "exact": ("losses", 1)}[method]

    def run(resumable=NOT_KEPT):
        given = (setting.passes(), setting.replacements("mean"), "kl", torch.arange(3))
        return eap_ig_scores(*given, 5, resumable) if method == "eap_ig" else exact_scores(*given, 40, 786, resumable)

    whole, computed = run(), getattr(acdc_module.Passes, counted)
    monkeypatch.setattr(acdc_module.Passes, counted, stopping(computed, before + done))
    with pytest.raises(StoppedError):
        run(kept)
    monkeypatch.setattr(acdc_module.Passes, counted, computed)
    assert torch.equal(run(kept), whole)
    assert f"going on at step {done}\n" in capsys.readouterr().err
