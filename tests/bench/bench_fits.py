"""How far fits end above one of many times the steps, with a config's own settings.

    python tests/bench/bench_fits.py --config config/demo.yaml --task ioi --kind refit --every 6
    PYTHONPATH=tests python tests/bench/bench_fits.py --kind planted --task chain-0

Needs a run of the config up to `circuits` (refit), `activations` (optimal) or `lens_activations` (oca); `planted` fits
constants of planted circuits that lack one of their edges, and takes no more of a config than `circuits.refit`. Every
`--every`-th fit is made twice from the same start: by the config's settings, and with `--times` their cap on steps and
a fifth of their tolerance. Prints for each its steps and validation loss, what it says is left, and how far above the
long fit it is.
"""

import argparse

import numpy as np
import torch

from oacore.ablation.components import components_of
from oacore.ablation.optimal import fit_constants, starting_means
from oacore.circuits.evaluate import refit_constants
from oacore.circuits.task import CircuitTask
from oacore.config.base import OptimalFit
from oacore.config.lenses import LENSES
from oacore.config.read import load_config
from oacore.config.run import Config
from oacore.engine.activations import read_statistics
from oacore.engine.prompts import batch_of
from oacore.fits.descent import ABSOLUTE_PROGRESS, Descent
from oacore.inputs import gated_model, read_splits
from oacore.jobs import files_of
from oacore.lenses.fit import fit_lens, fits_of
from oacore.lenses.task import LensTask
from oacore.store.artefacts import read_tensors
from oacore.store.layout import Layout

ABLATION = "optimal"


def refit(config: Config, task: str, every: int) -> tuple[OptimalFit, list[str], object]:
    """The constants of every n-th circuit that the methods found."""
    layout, settings = Layout(config), config.circuits
    searched = {
        method: files_of(layout, "circuits", task=task, method=method, ablation=ABLATION) for method in settings.methods
    }
    opened = CircuitTask.open(config, next(iter(searched.values()))[0], task)
    names, masks = [], []
    for method, (_, outputs) in searched.items():
        provenance = opened.provenance.requiring(method=method, ablation=ABLATION)
        _, tensors = read_tensors(outputs["search"], provenance)
        names += [f"{method} {int(mask.sum())}" for mask in tensors["masks"]]
        masks += list(tensors["masks"])
    chosen = torch.stack(masks[::every]).float()

    def fit(settings: OptimalFit) -> Descent:
        passes, start, scales = opened.passes, opened.start(ABLATION), opened.constant_scales
        of_fit = (passes["train"], passes["validation"], start, scales, chosen, settings)
        return refit_constants(*of_fit, names=names[::every], seed=opened.seed)[1]

    return settings.refit, names[::every], fit


def optimal(config: Config, task: str, every: int) -> tuple[OptimalFit, list[str], object]:
    """The constants of every n-th component."""
    inputs, _ = files_of(Layout(config), "optimal", task=task, method=ABLATION)
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    statistics = read_statistics(inputs["activations"], provenance, model.device)
    components = components_of(model, config.ablation.components)[::every]
    train, validation = (batch_of(splits[split], model.device) for split in ("train", "validation"))
    start = starting_means(model, components, statistics, positional=False)

    def fit(settings: OptimalFit) -> Descent:
        of_fit = (model, components, statistics, train, validation, settings)
        return fit_constants(*of_fit, start=start, seed=config.seed)

    return config.ablation.optimal, [item.name for item in components], fit


def oca(config: Config, task: str, every: int) -> tuple[OptimalFit, list[str], object]:
    """The constants of OCA at every layer."""
    inputs, _ = files_of(Layout(config), "lens_fit", task=task, lens="oca")
    opened, row = LensTask.open(config, inputs, task), LENSES["oca"]
    names = fits_of(row, opened.sources.model.n_layers)
    return opened.settings.oca, names, lambda settings: fit_lens(row, "", opened.sources, settings)[1]


def planted(config: Config, task: str, every: int) -> tuple[OptimalFit, list[str], object]:
    """The constants of a planted circuit without every n-th of its edges, each alone; `task` is its name and seed."""
    from bench_planted import CIRCUITS, Setting

    name, _, seed = task.partition("-")
    circuit = CIRCUITS[name](int(seed))
    setting, edges = Setting(circuit, ABLATION), np.argwhere(circuit.true_edges)[::every]
    masks = torch.from_numpy(circuit.true_edges).float().repeat(len(edges), 1, 1)
    for row, (destination, source) in enumerate(edges):
        masks[row, destination, source] = 0

    def fit(settings: OptimalFit) -> Descent:
        passes, start = setting.passes, setting.replacements.start
        return refit_constants(passes, passes, start, setting.scales, masks, settings, names=names)[1]

    names = [f"{task} without {destination},{source}" for destination, source in edges]
    return config.circuits.refit, names, fit


KINDS = {"refit": refit, "optimal": optimal, "oca": oca, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/demo.yaml")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--kind", choices=KINDS, default="refit")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--times", type=int, default=20)
    given = parser.parse_args()
    config = load_config(given.config)
    torch.set_num_threads(config.limits.threads)
    settings, names, fit = KINDS[given.kind](config, given.task, given.every)
    ours = fit(settings)
    longer = {"max_steps": given.times * settings.max_steps, "tolerance": settings.tolerance / 5}
    long = fit(settings.model_copy(update=longer))
    print(f"\n{given.config}, {given.task}, {given.kind}: {settings}; long: {longer}")
    print("fit                       steps converged       loss  left %  above %  long: steps       loss")
    above = 100 * (ours.best_loss - long.best_loss) / long.best_loss.clamp(min=ABSOLUTE_PROGRESS)
    left = 100 * ours.left / ours.best_loss.clamp(min=ABSOLUTE_PROGRESS)
    for row, name in enumerate(names):
        print(
            f"{name:24} {int(ours.n_steps[row]):6} {bool(ours.converged[row])!s:>9} {ours.best_loss[row]:10.6f} "
            f"{left[row]:7.2f} {above[row]:8.2f} {int(long.n_steps[row]):12} {long.best_loss[row]:10.6f}"
        )
    print(f"above: median {above.median():.2f} %, largest {above.max():.2f} %")


if __name__ == "__main__":
    main()
