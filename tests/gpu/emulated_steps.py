"""One step of every fit on the emulated GPU: a JSON line for each with what the host has sent.

In a process of its own, since the device stays registered; `test_emulated.py` runs it with its own path of modules.
"""

import json
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from emulated import Gpu
from test_mask_learning import Setting
from test_tracing import PLACES, some_recall
from torch.utils._python_dispatch import _disable_current_modes

from oacore import draws
from oacore.ablation import optimal
from oacore.ablation.components import components_of
from oacore.circuits import evaluate, learn
from oacore.circuits.hcgs import HardConcreteSampler
from oacore.circuits.search import Knob
from oacore.circuits.ugs import UniformSampler
from oacore.config.base import OptimalFit
from oacore.config.circuits import MaskFit
from oacore.engine.forward import final_norm
from oacore.fits import descent
from oacore.fits.whitening import Whitening
from oacore.lenses.constant import from_all_starts
from oacore.lenses.kl import unembedded_kl
from oacore.tracing import fit as tracing_fit

MASKS = MaskFit(n_steps=4, n_samples=2, n_prompts=3, record_every=2)
KNOBS = [Knob(1e-2, 0), Knob(1e-3, 0)]
FAMILIES = ("gpt2", "llama", "gemma2", "neox-parallel")
N_TOKENS = 16384


def _really(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A draw on the host as it is: what it draws decides how wide a batch is."""

    def drawn(*arguments: int) -> torch.Tensor:
        with _disable_current_modes():
            return draw(*arguments)

    return drawn


def steps(gpu: Gpu, family: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and what runs one step; whatever comes before the first step has been done."""
    setting = Setting(family)
    _ = setting.batch.host_lengths
    passes, scales = gpu.put(setting.passes()), gpu.put(setting.scales)
    model, batch, statistics = passes.engine.model, passes.examples.batch, gpu.put(setting.statistics)
    for name, sampler, ablation in (
        ("ugs optimal", UniformSampler(), "optimal"),
        ("ugs counterfactual", UniformSampler(), "counterfactual"),
        ("hcgs optimal", HardConcreteSampler(), "optimal"),
    ):
        replacements = gpu.put(setting.replacements(ablation))
        given = (sampler, KNOBS, [1e-2, 1e-3], passes, replacements, scales, "kl", MASKS, ablation == "optimal")
        with gpu.watched():
            sweep = learn._Sweep(*given)
            state = sweep.initial_state()
            drawn = [part.to(gpu.device) for part in sweep.draw(0)]
            number = torch.ones((), dtype=torch.float64).to(gpu.device)

        def mask_step(
            sweep: learn._Sweep = sweep,
            state: dict[str, torch.Tensor] = state,
            drawn: list[torch.Tensor] = drawn,
            number: torch.Tensor = number,
        ) -> None:
            _, gradients, _ = sweep.gradients(state, *drawn)
            sweep.descend(state, gradients, number)

        yield name, mask_step
    graph = setting.engine.graph
    masks = gpu.put(torch.rand(3, *graph.valid.shape).round() * torch.tensor(graph.valid))
    start = gpu.put(setting.replacements("optimal").start)
    fits = OptimalFit(batch_size=3, first_round=1, max_steps=1)
    yield "refit", lambda: _gradient_of(evaluate, evaluate.refit_constants, passes, passes, start, scales, masks, fits)
    items = tuple(components_of(setting.model, ("head", "mlp")))
    means = gpu.put(optimal.starting_means(setting.model, items, setting.statistics, positional=False))
    given = (model, items, statistics, batch, batch, fits)
    yield "optimal", lambda: _gradient_of(optimal, optimal.fit_constants, *given, start=means)
    recall = some_recall(2)
    _ = recall.host_lengths
    on_gpu, values = gpu.put(recall), gpu.put(torch.zeros(len(PLACES), setting.model.d_model))
    yield "tracing", lambda: tracing_fit.lost_probability_gradient(model, on_gpu, PLACES, values, N_TOKENS)
    layers, width = setting.model.n_layers, setting.model.d_model
    shapes = ((layers, 5, width), (layers, layers, width), (5, width))
    entering, constants, target = (gpu.put(torch.zeros(shape)) for shape in shapes)

    def lens_step() -> None:
        leaf = constants.detach().requires_grad_()
        final = final_norm(model, from_all_starts(model, entering, range(layers), leaf))
        torch.autograd.grad(unembedded_kl(model, final, target).mean(1).sum(), leaf)

    yield "oca", lens_step
    index = gpu.put(torch.arange(len(PLACES)))
    of_fits = dict.fromkeys(("first", "second", "value"), values)
    yield "descent", lambda: descent._adam(of_fits, index, values, values, 3)
    with gpu.watched():
        whitening = Whitening([width // 2, width - width // 2 - 1, 1], torch.ones_like(values))
        state = of_fits | whitening.initial_state()
        for block, places in whitening.blocks.items():  # as `refresh` leaves them
            shape = (len(values), *places.shape)
            whitening._roots[block] = values.new_ones(shape), values.new_zeros(*shape, block)

    def whitened_step() -> None:
        descent._whitened(whitening, state, index, values, values, 3)
        whitening.see(state, index, values)

    yield "whitened descent", whitened_step


def _gradient_of(module: object, fit: Callable[..., object], *given: object, **more: object) -> None:
    """The gradient of a fit's first step, without its convergence tests, at which the host may wait."""

    def first_step(
        start: torch.Tensor,
        scale: torch.Tensor,
        gradient: Callable[..., torch.Tensor],
        validate: object,
        settings: OptimalFit,
        draw: Callable[[int], tuple[torch.Tensor, ...]] | None = None,
        **_: object,
    ) -> descent.Descent:
        rows = list(range(len(start)))
        with _disable_current_modes():
            index = torch.arange(len(start))
            drawn = (0,) if draw is None else draw(0)
        drawn = [value.to(start.device) if isinstance(value, torch.Tensor) else value for value in drawn]
        gradient(descent.Running(index.to(start.device), rows), start, *drawn)
        none = torch.zeros(0)
        return descent.Descent(start, none, none, none, none, none, none)

    names = {"names": [str(n) for n in range(3)]} if module is evaluate else {}
    with mock.patch.object(module, "descend", first_step):
        fit(*given, **more, **names)


def main() -> None:
    """Every step of every family."""
    gpu = Gpu()
    really = _really(draws.prompts_of_step)
    patches = [mock.patch.object(module, "prompts_of_step", really) for module in (learn, evaluate, optimal)]
    patches.append(
        mock.patch.object(learn, "_uniform", lambda generator, knob, step, shape: torch.rand(shape, device=gpu.device))
    )
    for patch in patches:
        patch.start()
    for family in FAMILIES:
        for name, step in steps(gpu, family):
            with gpu.watched():
                step()  # what is made once, such as tables of positions
            with gpu.watched() as sent:
                step()
            print(
                json.dumps(
                    {
                        "family": family,
                        "step": name,
                        "launches": sum(sent.launches.values()),
                        "waits": dict(sent.waits),
                        "uploads": sent.uploads,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
