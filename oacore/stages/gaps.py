"""Measure the ablation loss gap of every component under every method, on the test prompts."""

import torch

from oacore import constants
from oacore.activations import batch_of, read_statistics
from oacore.artefacts import digest_of_tensors, write_table
from oacore.codehash import codehash
from oacore.config import Config
from oacore.gaps import evaluate, gap_table, summary_table
from oacore.layout import Layout, short_hash
from oacore.resume import Kept
from oacore.stages.common import components, gated_model, need, read_splits


def run(config: Config, task: str) -> None:
    """Write gaps.csv and summary.csv."""
    layout = Layout(config)
    model = gated_model(config, layout).model
    prompts, expect = read_splits(config, layout, task)
    statistics = read_statistics(need(layout.activations(task), "activations"), expect, model.device)
    items = components(config, model)
    fitted = {
        method: constants.load(need(layout.constants(task, method), "optimal"), items, {**expect, "method": method}).to(model.device)
        for method in config.ablation.fitted()
    }
    about = [expect, config.ablation.methods, [item.name for item in items], config.seed, codehash("oacore.stages.gaps"), torch.__version__]
    identity = short_hash([about, *(digest_of_tensors({"": rows}) for rows in fitted.values())])
    kept = Kept(layout.ablation(task, ".gaps-checkpoint.safetensors"), identity)
    gaps = evaluate(
        model,
        items,
        config.ablation.methods,
        statistics,
        fitted,
        batch_of(prompts["test"], model.device),
        batch_of(prompts["test"], model.device, counterfactual=True),
        seed=config.seed,
        tokens_per_batch=config.limits.tokens_per_batch,
        kept=kept,
        what=f"{task} gaps",
    )
    table = gap_table(items, gaps)
    for name, frame in {"gaps.csv": table, "summary.csv": summary_table(table)}.items():
        write_table(layout.ablation(task, name), frame, expect)
    kept.remove()
