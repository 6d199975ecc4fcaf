"""Measure lenses on held-out prompts: KL per layer, other context lengths, and what they predict token by token."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from oacore.config.run import Config
from oacore.engine.prompts import batch_of
from oacore.errors import UserError
from oacore.fits.convergence import Convergence, read_convergence
from oacore.inputs import settings_with_file
from oacore.jobs import Files
from oacore.lenses.evaluate import loss_table
from oacore.lenses.lens import Lens
from oacore.lenses.pictures import token_table
from oacore.lenses.rows import LensRows, rows_of
from oacore.lenses.task import LensTask
from oacore.progress import progress
from oacore.store.artefacts import write_table
from oacore.tasks.generate import generate

LENGTH_COLUMNS = ("lens", "init", "layer", "kl_nats", "se_nats", "n")
WINDOWS = "text"  # the task whose prompts are windows, of any length


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write loss.csv, pictures.csv and, where other lengths are asked for, lengths.csv."""
    opened = LensTask.open(config, inputs, task, inputs.all("lenses"))
    settings, provenance = opened.settings, opened.provenance
    lenses = opened.lenses(settings.lenses)
    rows, lengths = opened.sources.cache.read("test"), opened.splits["test"].lengths
    per_prompt = lengths - 1 if settings.positions == "all" else 1
    clusters = np.repeat(opened.splits["test"].cluster, per_prompt)
    losses = [
        loss_table(lens, rows, clusters, _fits(opened, file))
        for file, lens in progress(lenses.items(), what=f"{task} lenses", unit="lenses")
    ]
    drawn = [opened.lens(file) for file in settings.drawn_files()]
    first_prompts = batch_of(opened.splits["test"], opened.loaded.model.device).take(slice(0, settings.pictures))
    write_table(outputs["pictures"], token_table(opened.loaded, drawn, first_prompts), provenance)
    for path in outputs.all("lengths"):
        write_table(path, _length_table(config, inputs, opened, list(lenses.values())), provenance)
    write_table(outputs["loss"], pd.concat(losses), provenance)
    print(f"{task}: {len(lenses)} lenses on {len(rows)} held-out rows")


def _fits(opened: LensTask, file: str) -> list[Convergence]:
    """How the fit of each layer came out; empty for a lens that is not fitted."""
    if file not in opened.files:
        return []
    fits = list(read_convergence(opened.files[file], opened.provenance_of_fit(file)).values())
    return fits * opened.loaded.model.n_layers if len(fits) == 1 else fits  # one for all layers of a shared lens


def _length_table(config: Config, inputs: Files, opened: LensTask, lenses: Sequence[Lens]) -> pd.DataFrame:
    """The losses at other window lengths, on windows of the test documents; these run the model."""
    model, settings = opened.loaded.model, settings_with_file(config, inputs["model"], WINDOWS)
    tables = []
    for n_tokens in sorted({*opened.settings.lengths, settings.n_tokens}):
        if n_tokens > model.max_length:
            raise UserError(f"lenses.lengths: {n_tokens}; allowed: up to {model.max_length}, the model's context")
        windows = settings.model_copy(update={"n_tokens": n_tokens})
        try:
            prompts = generate(WINDOWS, windows, opened.loaded.tokenizer, config.seed, "test")
        except UserError as error:
            raise UserError(f"lenses.lengths: {n_tokens}: {error}") from None
        rows = LensRows.joined(
            [rows_of(model, part) for part in batch_of(prompts, model.device).split(config.limits.tokens_per_batch)]
        )
        for lens in lenses:
            table = loss_table(lens, rows, prompts.cluster)[[*LENGTH_COLUMNS]]
            table.insert(3, "n_tokens", n_tokens)
            tables.append(table)
    return pd.concat(tables)
