"""Measure lenses on held-out prompts: KL per layer, other context lengths, and what they predict token by token."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from oacore.activations import batch_of
from oacore.artefacts import write_table
from oacore.config import Config, Text
from oacore.errors import UserError
from oacore.forward import residual_after
from oacore.lens import Lens, Rows, losses_of, read_rows, rows_of
from oacore.metrics import clustered_mean_and_se
from oacore.progress import progress
from oacore.stages.lens_setting import Setting
from oacore.tasks import generate
from oacore.tasks.prompts import token_text

BATCH_ROWS = 512
DRAWN = ("oca", "logit", "tuned")
TOP = 5  # tokens of a picture's cell


def run(config: Config, task: str) -> None:
    """Write loss.csv, pictures.csv and, where other lengths are asked for, lengths.csv."""
    assert config.lenses is not None
    setting = Setting.open(config, task)
    device = setting.loaded.model.device
    lenses = setting.lenses(config.lenses.lenses)
    test = read_rows(setting.rows, "test", setting.expect, device)
    prompts = setting.splits["test"]
    every = config.lenses.positions == "all"
    clusters = np.repeat(np.arange(len(prompts.lengths)), prompts.lengths - 1) if every else np.arange(len(prompts.lengths))
    losses = pd.concat([_losses(lens, test, clusters) for lens in progress(lenses, what=f"{task} lenses", unit="lenses")])
    write_table(setting.layout.lens(task, "pictures.csv"), _pictures(setting), setting.expect)
    if config.lenses.lengths:
        write_table(setting.layout.lens(task, "lengths.csv"), _lengths(setting, lenses), setting.expect)
    write_table(setting.layout.lens(task, "loss.csv"), losses, setting.expect)
    print(f"{task}: {len(lenses)} lenses on {len(test.target)} held-out rows")


def _losses(lens: Lens, rows: Rows, clusters: np.ndarray) -> pd.DataFrame:
    """One row per layer; standard errors are over prompts."""
    kl, agree = losses_of(lens, rows, BATCH_ROWS)
    table = []
    for layer, values in enumerate(kl):
        mean, se = clustered_mean_and_se(values, clusters)
        table.append((lens.name, lens.init, layer, mean, se, float(agree[layer].double().mean()), len(values)))
    return pd.DataFrame(table, columns=["lens", "init", "layer", "kl_nats", "se_nats", "top1_agreement", "n"])


def _lengths(setting: Setting, lenses: list[Lens]) -> pd.DataFrame:
    """The same at other window lengths, on windows of the test documents; these run the model."""
    assert setting.config.lenses is not None
    loaded, found = setting.loaded, []
    settings = setting.config.tasks.text
    assert isinstance(settings, Text)
    path = settings.path.expanduser() if settings.path is not None else f"{setting.layout.source}/text.json"
    for n_tokens in sorted({*setting.config.lenses.lengths, settings.n_tokens}):
        if n_tokens > loaded.model.max_length:
            raise UserError(f"lenses.lengths: {n_tokens}; allowed: up to {loaded.model.max_length}, the model's context")
        try:
            other = settings.model_copy(update={"n_tokens": n_tokens, "path": path})
            prompts = generate("text", other, loaded.tokenizer, setting.config.seed, "test")
        except UserError as error:
            raise UserError(f"lenses.lengths: {n_tokens}: {error}") from None
        parts = [
            rows_of(loaded.model, part) for part in batch_of(prompts, loaded.model.device).split(setting.config.limits.tokens_per_batch)
        ]
        rows = Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("residual", "attention", "target")))
        for lens in lenses:
            table = _losses(lens, rows, np.arange(len(rows.target))).drop(columns="top1_agreement")
            table.insert(3, "n_tokens", n_tokens)
            found.append(table)
    return pd.concat(found)


@torch.no_grad()
def _pictures(setting: Setting) -> pd.DataFrame:
    """The most likely tokens of each lens at every layer and position of a few test prompts."""
    config, loaded = setting.config, setting.loaded
    assert config.lenses is not None
    model, rows = loaded.model, []
    batch = batch_of(setting.splits["test"], model.device)
    first_init = config.lenses.init[0]
    lenses = [
        lens for name in DRAWN for lens in setting.lenses(config.lenses.lenses) if lens.name == name and lens.init in ("", first_init)
    ]
    for number in range(min(config.lenses.pictures, len(batch))):
        tokens = batch.tokens[number : number + 1, : int(batch.lengths[number])]
        shown = [token_text(loaded.tokenizer, token) for token in tokens[0].tolist()]
        for lens in lenses:
            for layer in range(model.n_layers + 1):
                probs = lens.logits(residual_after(model, tokens, layer)[0], layer).softmax(-1)  # [T, V]
                top = probs.topk(min(TOP, probs.shape[-1]))
                for position, (values, ids) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
                    about: tuple[Any, ...] = (number, lens.name, lens.init, layer, position, shown[position])
                    words = [token_text(loaded.tokenizer, token) for token in ids]
                    rows += [(*about, rank + 1, word, value) for rank, (word, value) in enumerate(zip(words, values, strict=True))]
    return pd.DataFrame(rows, columns=["prompt", "lens", "init", "layer", "position", "token", "rank", "predicted", "probability"])
