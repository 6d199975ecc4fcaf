"""Fit optimal constants for every component."""

from pathlib import Path

import torch

from oacore import constants, optimal
from oacore.ablation import width
from oacore.activations import batch_of, read_statistics
from oacore.codehash import codehash
from oacore.config import Config, Method
from oacore.layout import Layout, short_hash
from oacore.stages.common import components, gated_model, need, read_splits, stamp


def run(config: Config, task: str, method: Method) -> None:
    """Write constants-{method}.safetensors. `optimal_positional` starts from the better of the optimal constant and the positional mean."""
    layout, settings = Layout(config), config.ablation.optimal
    positional = method == "optimal_positional"
    loaded = gated_model(config, layout)
    model = loaded.model
    splits, expect = read_splits(config, layout, task)
    train, validation = (batch_of(splits[split], model.device) for split in ("train", "validation"))
    statistics = read_statistics(need(layout.activations(task), "activations"), expect, model.device)
    items = components(config, model)
    limit = config.limits.tokens_per_batch
    start = optimal.starting_means(model, items, statistics, positional=positional)
    if positional:
        best = constants.load(need(layout.constants(task, "optimal"), "optimal"), items, {**expect, "method": "optimal"})
        start = optimal.better_start(model, validation, items, start, best.to(model.device), limit)
    metadata = {**stamp(config, layout, task), **expect, "method": method, "settings": settings.model_dump()}
    path = Path(layout.constants(task, method))
    checkpoint = path.with_name(f".{path.stem}-checkpoint.safetensors")
    fit = optimal.fit(
        model,
        items,
        statistics,
        train,
        validation,
        settings,
        start=start,
        seed=config.seed,
        tokens_per_batch=limit,
        checkpoint=checkpoint,
        identity=short_hash([metadata, [item.name for item in items], codehash("oacore.optimal"), torch.__version__]),
        what=f"{task} {method}",
    )
    constants.save(path, fit, [width(model, item.kind) for item in items], metadata)
    checkpoint.unlink(missing_ok=True)
    print(f"{task} {method}: {int(fit.converged.sum())} of {len(items)} components converged in {int(fit.n_steps.max())} steps or fewer")
