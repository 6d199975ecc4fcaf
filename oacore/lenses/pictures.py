"""Single prompts, token by token: what each lens reads at every layer and position."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from oacore.engine.clean import Batch
from oacore.engine.forward import residual_after
from oacore.lenses.lens import Lens
from oacore.models.load import Loaded
from oacore.tasks.prompts import token_text

TOP = 5  # tokens of a cell


@torch.no_grad()
def token_table(loaded: Loaded, lenses: Sequence[Lens], prompts: Batch) -> pd.DataFrame:
    """The most likely tokens of each lens: one row per prompt, lens, layer, position and rank, from 1."""
    model, rows = loaded.model, []
    for number in range(len(prompts)):
        tokens = prompts.tokens[number : number + 1, : int(prompts.lengths[number])]
        texts = [token_text(loaded.tokenizer, token) for token in tokens[0].tolist()]
        for lens in lenses:
            for layer in range(model.n_layers + 1):
                probs = lens.logits(residual_after(model, tokens, layer)[0], layer).softmax(-1)  # [T, V]
                top = probs.topk(min(TOP, probs.shape[-1]))
                for position, (values, ids) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
                    cell: tuple[Any, ...] = (number, lens.name, lens.init, layer, position, texts[position])
                    words = [token_text(loaded.tokenizer, token) for token in ids]
                    ranked = enumerate(zip(words, values, strict=True), 1)
                    rows += [(*cell, rank, word, value) for rank, (word, value) in ranked]
    columns = ["prompt", "lens", "init", "layer", "position", "token", "rank", "predicted", "probability"]
    return pd.DataFrame(rows, columns=columns)
