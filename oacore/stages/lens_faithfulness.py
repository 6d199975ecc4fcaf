"""Change residuals, and compare how lenses and model react."""

import pandas as pd

from oacore.config.run import Config
from oacore.engine.prompts import batch_of
from oacore.errors import UserError
from oacore.inputs import items_of
from oacore.jobs import Files
from oacore.lenses.faithfulness import faithfulness_table
from oacore.lenses.lens import Lens
from oacore.lenses.numbers import TRAIN_ROWS
from oacore.lenses.task import LensTask
from oacore.progress import progress
from oacore.store.artefacts import write_table
from oacore.store.items import Item


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write faithfulness.csv."""
    opened = LensTask.open(config, inputs, task, inputs.all("lenses"))
    settings, model = opened.settings.faithfulness, opened.loaded.model
    assert settings is not None
    layers = settings.layers if settings.layers is not None else tuple(range(model.n_layers))
    if beyond := [layer for layer in layers if layer >= model.n_layers]:
        raise UserError(
            f"lenses.faithfulness.layers: {', '.join(map(str, beyond))}; allowed: 0 to {model.n_layers - 1}"
        )
    lenses = list(opened.lenses(settings.lenses).values())
    batch = batch_of(opened.splits["test"], model.device).take(slice(0, settings.n_prompts))
    train_residual = opened.sources.cache.read("train", TRAIN_ROWS).residual
    items = items_of(
        config,
        inputs,
        "faithfulness",
        opened.provenance,
        ["train", "test"],
        ["oacore.lenses.faithfulness"],
        positions=opened.settings.positions,
        settings=settings.model_dump(exclude={"lenses", "layers"}),
    )
    tables = []
    for layer in progress(layers, what="faithfulness", unit="layers"):

        def compute(new: list[int], layer: int = layer) -> list[Item]:
            asked = [lenses[index] for index in new]
            table = faithfulness_table(
                model,
                asked,
                batch,
                train_residual,
                [layer],
                n_directions=settings.n_directions,
                resample_sizes=settings.resample_sizes,
                target_kl=settings.target_kl,
                seed=config.seed,
                tokens_per_batch=config.limits.tokens_per_batch,
            )
            return [Item({}, {"table": table[of_lens(table, lens)].to_dict("list")}) for lens in asked]

        own = [{"layer": layer} | opened.determined_by(lens) for lens in lenses]
        tables += [pd.DataFrame(item.facts["table"]) for item in items.get(own, compute)]
    write_table(outputs["table"], pd.concat(tables, ignore_index=True), opened.provenance)


def of_lens(table: pd.DataFrame, lens: Lens) -> "pd.Series[bool]":
    """Which rows of a table are a lens's."""
    return (table["lens"] == lens.name) & (table["init"] == lens.init)
