"""Single facts, token by token: what restoring one token's output around one layer brings back."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pandas as pd

from oacore.config.tracing import Tracing
from oacore.models.load import Loaded
from oacore.progress import progress
from oacore.tasks.prompts import token_text
from oacore.tracing.effects import Traced
from oacore.tracing.facts import TracedFacts
from oacore.tracing.places import Place, place
from oacore.tracing.recall import Recall
from oacore.tracing.tables import PICTURE_COLUMNS

Traces = Callable[[str, int, Recall, Sequence[Place]], Traced]  # (corruption, row of the test facts, fact, places)


def picture_table(
    loaded: Loaded, facts: TracedFacts, rows: Sequence[int], corruptions: Sequence[str], tracing: Tracing, trace: Traces
) -> pd.DataFrame:
    """Probability of the answer with each token's output of each layer restored, at the middle one of the windows.

    Args:
        rows: of the test facts, in the order of their pictures.
        corruptions: by their names in the tables.

    Returns:
        one row per picture, corruption, site, layer and token.
    """
    tokenizer, n_layers = loaded.tokenizer, loaded.model.n_layers
    width = tracing.windows[len(tracing.windows) // 2]
    table: list[tuple[Any, ...]] = []
    for number, row in enumerate(progress(rows, what="pictures", unit="facts")):
        recall = facts.test.take(slice(row, row + 1))
        length, inside = int(recall.last[0]) + 1, recall.in_subject[0].tolist()
        tokens = [token_text(tokenizer, token) for token in recall.tokens[0, :length].tolist()]
        answer = tokenizer.decode([token for token in recall.answer[0].tolist() if token >= 0])
        cells = [(layer, position) for layer in range(n_layers) for position in range(length)]
        for name, site in product(corruptions, tracing.sites):
            places = [place(site, position, layer, width, n_layers) for layer, position in cells]
            traced = trace(name, row, recall, places)
            both = float(traced.clean[0]), float(traced.corrupted[0])
            for (layer, position), p_restored in zip(cells, traced.restored[:, 0].tolist(), strict=True):
                cell = (number, facts.text[row], answer, name, site, width, layer, position)
                table.append((*cell, tokens[position], inside[position], *both, p_restored))
    return pd.DataFrame(table, columns=list(PICTURE_COLUMNS))
