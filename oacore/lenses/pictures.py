"""Single prompts, token by token: what each lens reads at every layer and position."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.engine.forward import residual_after
from oacore.lenses.lens import Lens
from oacore.models.weights import Model
from oacore.tasks.prompts import token_text

TOP = 5  # tokens of a cell
PICTURE_COLUMNS = ("prompt", "lens", "init", "layer", "position", "token", "rank", "predicted", "probability")


@torch.no_grad()
def top_tokens(model: Model, lens: Lens, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens of a lens on one prompt [1, T], and their probabilities: both [L + 1, T, n]."""
    of_layers = []
    for layer in range(model.n_layers + 1):
        probs = lens.logits(residual_after(model, tokens, layer)[0], layer).softmax(-1)  # [T, V]
        of_layers.append(probs.topk(min(TOP, probs.shape[-1])))
    return torch.stack([top.indices for top in of_layers]), torch.stack([top.values for top in of_layers])


def token_table(tokenizer: Any, prompt: int, lens: Lens, tokens: Tensor, ids: Tensor, values: Tensor) -> pd.DataFrame:
    """Of `top_tokens`, one row per layer, position and rank, from 1; `prompt` is the number of the picture."""
    texts = [token_text(tokenizer, token) for token in tokens[0].tolist()]
    rows = []
    for layer, position in np.ndindex(*ids.shape[:2]):
        cell = (prompt, lens.name, lens.init, layer, position, texts[position])
        best = zip(ids[layer, position].tolist(), values[layer, position].tolist(), strict=True)
        rows += [(*cell, rank, token_text(tokenizer, token), value) for rank, (token, value) in enumerate(best, 1)]
    return pd.DataFrame(rows, columns=list(PICTURE_COLUMNS))
