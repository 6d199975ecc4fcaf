"""Measure lenses on held-out prompts: KL per layer, other context lengths, and what they predict token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.config.run import Config
from oacore.engine.prompts import batch_of
from oacore.errors import UserError
from oacore.fits.convergence import Convergence, read_convergence
from oacore.inputs import items_of, settings_with_file
from oacore.jobs import Files
from oacore.lenses.evaluate import lens_losses, loss_table
from oacore.lenses.lens import Lens
from oacore.lenses.pictures import PICTURE_COLUMNS, token_table, top_tokens
from oacore.lenses.rows import LensRows, rows_of
from oacore.lenses.task import LensTask
from oacore.progress import progress
from oacore.store.artefacts import write_table
from oacore.store.items import Item, Items
from oacore.store.samples import write_samples
from oacore.tasks.generate import generate
from oacore.tasks.prompts import Prompts

LENGTH_COLUMNS = ("lens", "init", "layer", "kl_nats", "se_nats", "n")
WINDOWS = "text"  # the task whose prompts are windows, of any length


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write loss.csv, what its KLs are means of, pictures.csv and, where other lengths are asked for, lengths.csv."""
    opened = LensTask.open(config, inputs, task, inputs.all("lenses"))
    settings, provenance = opened.settings, opened.provenance
    lenses = opened.lenses(settings.lenses)
    items = _items(config, inputs, opened, positions=settings.positions)
    own = [opened.determined_by(lens) for lens in lenses.values()]

    def compute(new: list[int]) -> Iterator[Item]:
        rows, every = opened.sources.cache.read("test"), list(lenses.values())
        return (_item(every[index], rows) for index in progress(new, what=f"{task} lenses", unit="lenses"))

    lengths = opened.splits["test"].lengths
    clusters = np.repeat(opened.splits["test"].cluster, lengths - 1 if settings.positions == "all" else 1)
    of_lenses = items.get(own, compute, f"{task} lenses")
    losses = [
        loss_table(lens, _losses(item), clusters, _fits(opened, file))
        for (file, lens), item in zip(lenses.items(), of_lenses, strict=True)
    ]
    write_table(outputs["pictures"], _pictures(config, inputs, opened), provenance)
    for path in outputs.all("lengths"):
        write_table(path, _length_table(config, inputs, opened, list(lenses.values())), provenance)
    measured_on = {"prompts": provenance.required["prompts_hash"]["test"], "positions": settings.positions}
    by_prompt = {"kl_nats": torch.cat([_losses(item)[0] for item in of_lenses])}
    write_samples(outputs["by_prompt"], by_prompt, clusters, measured_on, provenance)
    write_table(outputs["loss"], pd.concat(losses), provenance)
    print(f"{task}: {len(lenses)} lenses on {len(clusters)} held-out rows")


def _items(config: Config, inputs: Files, opened: LensTask, **shared: Any) -> Items:
    modules = ["oacore.lenses.evaluate", "oacore.lenses.pictures", "oacore.lenses.rows"]
    return items_of(config, inputs, "lens-losses", opened.provenance, ["train", "test"], modules, **shared)


def _item(lens: Lens, rows: LensRows) -> Item:
    return Item(dict(zip(("kl", "agree"), lens_losses(lens, rows), strict=True)))


def _losses(item: Item) -> tuple[Tensor, Tensor]:
    return item.tensors["kl"], item.tensors["agree"]


def _pictures(config: Config, inputs: Files, opened: LensTask) -> pd.DataFrame:
    """What the drawn lenses predict on the first test prompts, token by token."""
    model, tokenizer = opened.loaded.model, opened.loaded.tokenizer
    lenses = [opened.lens(file) for file in opened.settings.drawn_files()]
    prompts = batch_of(opened.splits["test"], model.device).take(slice(0, opened.settings.pictures))
    wanted = [(number, lens) for number in range(len(prompts)) for lens in lenses]
    tokens = [prompts.tokens[number : number + 1, : int(prompts.lengths[number])] for number in range(len(prompts))]

    def compute(new: list[int]) -> Iterator[Item]:
        tops = (top_tokens(model, lens, tokens[number]) for number, lens in (wanted[index] for index in new))
        return (Item({"ids": ids, "values": values}) for ids, values in tops)

    own = [{"picture of prompt": number} | opened.determined_by(lens) for number, lens in wanted]
    tables = [
        token_table(tokenizer, number, lens, tokens[number], item.tensors["ids"], item.tensors["values"])
        for (number, lens), item in zip(wanted, _items(config, inputs, opened).get(own, compute), strict=True)
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(PICTURE_COLUMNS))


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

        def compute(new: list[int], prompts: Prompts = prompts) -> Iterator[Item]:
            parts = batch_of(prompts, model.device).split(config.limits.tokens_per_batch)
            rows = LensRows.joined([rows_of(model, part) for part in parts])
            return (_item(lenses[index], rows) for index in new)

        own = [opened.determined_by(lens) for lens in lenses]
        items = _items(config, inputs, opened, windows=prompts.digest())
        for lens, item in zip(lenses, items.get(own, compute, f"lenses on windows of {n_tokens} tokens"), strict=True):
            table = loss_table(lens, _losses(item), prompts.cluster)[[*LENGTH_COLUMNS]]
            table.insert(3, "n_tokens", n_tokens)
            tables.append(table)
    return pd.concat(tables)
