"""Cost of optimal constants: our fit beside the plain way, on one machine in one run.

    python tests/bench/bench_ablation.py [--config config/demo.yaml] [--task ioi] [--threads 2]

Needs the task's activations (`snakemake` or `python -m oacore all` with the same config). Prints
* the time until every component is within 1 % of its converged gap (validation prompts). Converged: the least gap that
  this fit or a reference fit reached, which has twice the batch, four times the patience, a tolerance of 0.1 % and at
  most 1 000 steps;
* the plain way: for every component its own full forward pass of all layers from the tokens, a clean run every step,
  autograd through all of it, 10 000 steps (the paper's number), extrapolated from a few.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from oacore.ablation import optimal
from oacore.ablation.components import Component, components_of, group_components, width
from oacore.config.base import OptimalFit
from oacore.config.read import load_config
from oacore.draws import prompts_of_step
from oacore.engine.activations import read_statistics
from oacore.engine.clean import Batch
from oacore.engine.forward import add_attention, at, combine_heads, embed, heads, logits_of, mlp, residual_after
from oacore.engine.prompts import batch_of
from oacore.fits.descent import ABSOLUTE_PROGRESS, Descent
from oacore.inputs import model_source
from oacore.metrics import kl_divergence
from oacore.models.load import load, pick_device
from oacore.models.weights import Model
from oacore.store.layout import Layout
from oacore.tasks.stored import read_prompts

PLAIN_STEPS = 10_000
REFERENCE_STEPS = 1000


def plain_loss(model: Model, batch: Batch, component: Component, constant: Tensor) -> Tensor:
    """One component's loss as one would write it with hooks: clean run, then a second run of all layers with one output
    replaced.
    """
    last = batch.lengths - 1
    with torch.no_grad():
        target = logits_of(model, at(residual_after(model, batch.tokens), last)[:, 0]).log_softmax(-1)
    residual = embed(model, batch.tokens)
    for layer in range(model.n_layers):
        z = heads(model, layer, residual)
        if component.kind == "head" and component.layer == layer:
            z = z.clone()
            z[:, 1:, component.head] = constant
        if component.kind == "mlp" and component.layer == layer:
            middle = residual + combine_heads(model, layer, z)
            out = mlp(model, layer, middle).clone()
            out[:, 1:] = constant
            residual = middle + out
        else:
            residual = add_attention(model, layer, residual, combine_heads(model, layer, z))
    return kl_divergence(target, logits_of(model, at(residual, last)[:, 0])).mean()


def plain_step(
    model: Model,
    batch: Batch,
    components: list[Component],
    constants: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    optimiser.zero_grad()
    for component in components:
        plain_loss(model, batch, component, constants[component.name]).backward()
    optimiser.step()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/demo.yaml")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain-steps", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = load_config(given.config)
    layout, settings = Layout(config), config.ablation.optimal
    device = pick_device(config.device)
    source = model_source(config, Path(layout.model_json))
    model = load(source, revision=config.revision, dtype=config.dtype, device=config.device).model
    train, validation = (
        batch_of(read_prompts(layout.prompts(given.task), split), device) for split in ("train", "validation")
    )
    statistics = read_statistics(layout.activations(given.task), device=device)
    components = components_of(model, ("head", "mlp"))
    start = optimal.starting_means(model, components, statistics, positional=False)
    times: list[float] = []

    def fit(chosen: OptimalFit) -> Descent:
        times.clear()
        return optimal.fit_constants(
            model,
            components,
            statistics,
            train,
            validation,
            chosen,
            start=start,
            tokens_per_batch=config.limits.tokens_per_batch,
            on_test=lambda: times.append(time.perf_counter()),
        )

    begin = time.perf_counter()
    ours = fit(settings)
    seconds = [moment - begin for moment in times]
    reference = fit(
        settings.model_copy(
            update={
                "batch_size": 2 * settings.batch_size,
                "patience": 4 * settings.patience,
                "tolerance": 1e-3,
                "max_steps": REFERENCE_STEPS,
            }
        )
    )
    converged = torch.minimum(ours.best_loss, reference.best_loss).cpu()
    best = ours.curve_losses.cummin(0).values[1:]  # [tests, C]
    within = best <= 1.01 * converged + ABSOLUTE_PROGRESS

    parts = [
        Component(item.layer, item.kind, item.head)
        for group in group_components(components)
        for item in group.components
    ]
    constants = {item.name: torch.zeros(width(model, item.kind), device=device, requires_grad=True) for item in parts}
    optimiser = torch.optim.AdamW(constants.values(), lr=2e-3, weight_decay=0.0)
    plain = []
    for step in range(given.plain_steps + 1):
        batch = train.take(prompts_of_step(len(train), settings.batch_size, 0, step).to(device))
        synchronise(device)
        at_start = time.perf_counter()
        plain_step(model, batch, parts, constants, optimiser)
        synchronise(device)
        plain.append(time.perf_counter() - at_start)
    per_step = sorted(plain[1:])[given.plain_steps // 2]

    threads = f"{given.threads} threads, torch {torch.__version__}"
    print(f"\n{given.task}, {len(components)} components, batch {settings.batch_size}, {device}, {threads}")
    steps = f"{int(ours.n_steps.max())} steps at most, {int(ours.n_steps.sum())} component steps in all"
    print(f"our fit:   {seconds[-1]:8.1f} s to its own convergence ({steps})")
    for share in (0.5, 0.9, 1.0):
        reached = (within.float().mean(1) >= share).nonzero()
        text = f"{seconds[int(reached[0])]:8.1f} s" if len(reached) else "     never"
        print(f"           {text} until {share:.0%} of the components are within 1 % of their converged gap")
    excess = (ours.best_loss.cpu() / converged.clamp(min=1e-12) - 1)[converged > 1e-5]
    print(
        f"           at its end the median component is {excess.median():.2%} above its converged gap, the worst "
        f"{excess.max():.2%}"
    )
    source = f"extrapolated from {per_step * 1e3:.0f} ms a step (median of {given.plain_steps})"
    print(f"plain way: {per_step * PLAIN_STEPS:8.0f} s for {PLAIN_STEPS} steps, {source}")


if __name__ == "__main__":
    main()
