"""Steps that a GPU replays as CUDA graphs give what they give when they are launched: here recorded on the CPU, where a
replay runs no Python.
"""

import math
from functools import partial

import pytest
import torch
from recorded import launching, replaying
from test_mask_learning import Setting

from oacore.circuits.edges import Edges
from oacore.circuits.evaluate import refit_constants
from oacore.circuits.hcgs import HardConcreteSampler
from oacore.circuits.passes import Passes
from oacore.circuits.search import Knob
from oacore.circuits.topk import TopKSampler
from oacore.circuits.ugs import UniformSampler
from oacore.config.base import OptimalFit
from oacore.config.circuits import MaskFit
from oacore.draws import uploaded
from oacore.engine import fused, masked_blocks
from oacore.engine.masked import Engine
from oacore.errors import UserError
from oacore.fits import descent, replayed
from oacore.fits.descent import descend
from oacore.fits.replayed import Replayed

KNOBS = [Knob(1e-2, 0), Knob(1e-3, 1)]
MASKS = MaskFit(n_steps=7, n_samples=2, n_prompts=3, record_every=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting():
    setting = Setting()
    setting.engine = Engine(setting.model, layers_at_once=2)
    return setting


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Passes leave nothing out by what masks hold, pruning waits for nothing, and operations are fused."""
    gradients = Passes.gradients
    monkeypatch.setattr(
        Passes, "gradients", lambda self, *given, **options: gradients(self, *given, **options | {"skip_dead": False})
    )
    monkeypatch.setattr(Edges, "prune", Edges.on_paths)
    for module in (fused, masked_blocks):
        monkeypatch.setattr(module, "fuses", lambda x: True)


@pytest.mark.parametrize(
    ("sampler", "ablation"),
    [
        (UniformSampler(), "optimal"),
        (UniformSampler(dynamic_window=True), "counterfactual"),
        (UniformSampler(), "resample"),
        (HardConcreteSampler(), "resample_positional"),
        (TopKSampler(torch.tensor([9.0, 30.0])), "optimal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_learned_masks(setting, as_on_a_gpu, sampler, ablation):
    learn = partial(setting.learn, sampler, KNOBS, ablation, settings=MASKS)
    plain = learn()
    with replaying() as captured:
        ours = learn()
    assert len(captured) == 1 and captured[0] > 100, "one graph for all steps but the first"
    with launching():
        theirs = learn()
    for name in ("scores", "step_losses", "step_sizes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), atol=1e-5, rtol=1e-4)
    assert not torch.equal(ours.step_losses[-1], ours.step_losses[-2])
    if ours.constants is not None:
        assert all(torch.equal(*pair) for pair in zip(ours.constants, theirs.constants, strict=True))


def test_refitted_constants_through_whitened_rounds(setting, as_on_a_gpu, monkeypatch):
    """Every round is a graph of its own, for the fits that go on; roots that are refreshed between steps are seen."""
    monkeypatch.setattr(descent, "GRADIENTS_OF_ADAM", 4)
    monkeypatch.setattr(descent, "LOOK_EVERY", 3)
    masks = (torch.rand(3, *setting.engine.graph.valid.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    masks *= torch.tensor(setting.engine.graph.valid)
    start, fits = setting.replacements("optimal").start, OptimalFit(batch_size=3, first_round=4, max_steps=28)

    def refit():
        passes = setting.passes()
        return refit_constants(passes, passes, start, setting.scales, masks, fits, names=["a", "b", "c"])[1]

    plain = refit()
    with replaying() as captured:
        ours = refit()
    assert len(captured) == len(fits.round_ends) == 3
    with launching():
        theirs = refit()
    for name in ("best", "curve_losses", "left"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), atol=1e-4, rtol=1e-3)
    assert (ours.curve_losses[-1] < ours.curve_losses[0]).all()


def bowl(draw, gradient, **more):
    """A fit of two rows."""
    settings = OptimalFit(first_round=30, max_steps=30, learning_rate=0.1)
    given = (torch.ones(2, 3), torch.ones(1, 1), gradient, lambda running, values: values.square().sum(1), settings)
    return descend(*given, names="ab", key="rate", draw=draw, **more)


def test_a_number_that_is_not_finite_is_found_at_its_step():
    def draw(step):
        return (torch.tensor(math.nan if step == 17 else 1.0),)

    def gradient(running, values, factor):
        return torch.cat((values[:1], values[1:] * factor))

    with replaying(), pytest.raises(UserError, match=r"^step 18: not finite: gradient of b;"):
        bowl(draw, gradient)


def test_a_number_of_the_host_would_stay_what_it_was():
    """That is what the recorded graph is for: such a step is found out."""
    steps = iter(range(1000))

    def wrong(running, values, drawn):
        return values * (1 + 0.1 * next(steps))

    with replaying():
        ours = bowl(lambda step: (torch.zeros(()),), wrong)
    steps = iter(range(1000))
    theirs = bowl(lambda step: (torch.zeros(()),), wrong)
    assert not torch.allclose(ours.best, theirs.best)


def test_a_step_that_waits_is_launched_instead_and_said_once(capsys):
    def waits(running, values, drawn):
        return values * float(drawn.sum())

    def draw(step):
        return (torch.tensor([1.0 + step]),)

    with replaying() as captured:
        ours = bowl(draw, waits)
    assert captured == []
    assert capsys.readouterr().err.count("a step can't be captured as a CUDA graph, going on without: operation") == 1
    torch.testing.assert_close(ours.best, bowl(draw, waits).best)


def test_every_shape_has_its_graph_and_returned_values_are_kept():
    total, calls = torch.zeros(()), []

    def step(values, factor):
        calls.append(len(values))
        total.add_(values.sum())
        return (values * factor,)

    with replaying() as captured:
        taken = Replayed(step, CPU)
        found = [taken(torch.full((n,), float(n)), n)[0] for n in (2, 2, 3, 2, 3, 3)]
    assert [value.tolist() for value in found] == [[n * n] * n for n in (2, 2, 3, 2, 3, 3)]
    assert total == 3 * 4 + 3 * 9, "each call once, a capture none"
    assert len(captured) == 2 and calls == [2, 2, 3, 3], "launched and captured once each"


def test_a_switch_launches_every_step(monkeypatch):
    assert replayed.replays(torch.device("cuda")) and not replayed.replays(CPU)
    monkeypatch.setenv(replayed.SWITCH, "0")
    assert not replayed.replays(torch.device("cuda"))


def test_what_is_drawn_on_the_device_is_not_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    here, there = torch.ones(2), torch.ones(2, device="meta")
    assert uploaded(there, "cuda") is there and pinned == []
    assert uploaded(here, "cuda") is here and pinned == [here]
    assert uploaded(here, "cpu") is here and len(pinned) == 1
