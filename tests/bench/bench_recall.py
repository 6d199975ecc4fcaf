"""Where each corruption finds a planted recall, and how sharply: peak layer, and the AIE there against that of all
other layers.

    python tests/bench/bench_recall.py [--seeds 0 1 2] [--corruptions oat gaussian-3]

The model looks a subject's attribute up in one MLP, and one attention layer moves it to the last token
(`planted.recall`). Subjects are split 60/20/20; OAT's constants are fitted on the first, stop on the second, and
everything is measured on the last.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from planted.recall import PlantedRecall, recall

from oacore.config.tracing import CORRUPTIONS as KINDS
from oacore.config.tracing import TracingFit, kind_and_scale
from oacore.tracing.corruptions import corruptor
from oacore.tracing.effects import aie_table
from oacore.tracing.fit import NO_CONSTANTS, fit_place_constants, place_constants
from oacore.tracing.places import NOWHERE, Curve, places_of
from oacore.tracing.recall import Recall
from oacore.tracing.subjects import subject_statistics
from oacore.tracing.trace import trace

CORRUPTIONS = (
    "oat",
    "oat_cautious",
    "oat_shared",
    "mean",
    "token_replacement",
    "gaussian-1",
    "gaussian-3",
    "gaussian-5",
    "gaussian_scalar-3",
)
FIT = TracingFit(max_steps=350, tolerance=0.02)
N_DRAWS, TOKENS_PER_BATCH = 5, 16384


def splits(planted: PlantedRecall, seed: int) -> tuple[list[Recall], np.ndarray]:
    """The facts of train, validation and test subjects, and the number of each test fact's subject."""
    rows = torch.arange(len(planted.tokens))
    numbers = torch.stack([planted.tokens[rows, planted.subject[:, 0] + i] for i in range(2)], 1).unique(
        dim=0, return_inverse=True
    )[1]
    n_subjects = int(numbers.max()) + 1
    order = torch.randperm(n_subjects, generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n_subjects))[numbers] / n_subjects
    # Another subject at the same place: all have two tokens, so each row takes the subject of the one before it.
    other = planted.tokens.clone()
    for row, ((first, end), (start, stop)) in enumerate(
        zip(planted.subject.tolist(), planted.subject.roll(1, 0).tolist(), strict=True)
    ):
        other[row, first:end] = planted.tokens[row - 1, start:stop]
    last, answers = planted.lengths - 1, planted.answers[:, None]
    whole = Recall(planted.tokens, planted.lengths, last, planted.subject, answers, other, rows, numbers)
    parts = [((rank >= low) & (rank < high)).nonzero()[:, 0] for low, high in ((0, 0.6), (0.6, 0.8), (0.8, 1.0))]
    taken = [replace(whole.take(part), numbers=torch.arange(len(part))) for part in parts]
    return taken, numbers[parts[-1]].numpy()


def curves(
    planted: PlantedRecall, seed: int, names: tuple[str, ...] = CORRUPTIONS, n_draws: int = N_DRAWS
) -> pd.DataFrame:
    """AIE of every layer's MLP at the last subject token, and of its attention at the last token, one layer at a
    time.
    """
    model = planted.model
    (train, validation, test), subjects = splits(planted, seed)
    of_sites = [Curve("mlp", "last_subject", 1), Curve("attention", "last", 1)]
    places = places_of(of_sites, model.n_layers)
    statistics = subject_statistics(model, train)
    constants = NO_CONSTANTS
    if any(KINDS[kind_and_scale(name)[0]].fitted for name in names):
        every = [*places, NOWHERE]
        descent = fit_place_constants(model, every, train, validation, statistics, FIT, seed=seed)
        constants = place_constants(model, every, validation, descent.best, TOKENS_PER_BATCH)
    tables = []
    for name in names:
        corrupt = corruptor(name, model, statistics, constants, seed, n_draws)
        traced = trace(model, test, places, corrupt, TOKENS_PER_BATCH, "")
        tables.append(aie_table(name, traced, places, subjects, of_sites, model.n_layers))
    return pd.concat(tables, ignore_index=True)


def peaks(table: pd.DataFrame) -> Iterator[tuple[str, str, int, float, float]]:
    """Of each curve: corruption, site, layer of the largest AIE, that AIE, and its ratio to the sum of all others'
    sizes.
    """
    for (name, site), curve in table.groupby(["corruption", "site"], sort=False):
        top = curve.loc[curve["aie"].idxmax()]
        others = curve["aie"].abs().sum() - abs(top["aie"])
        yield str(name), str(site), int(top["layer"]), float(top["aie"]), float(top["aie"] / others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corruptions", nargs="+", default=list(CORRUPTIONS))
    given = parser.parse_args()
    print(
        f"{'seed':>4} {'corruption':18} {'site':10} {'true layer':>10} {'peak layer':>10} {'AIE':>6} "
        f"{'peak / off-peak':>15}"
    )
    for seed in given.seeds:
        planted = recall(seed)
        true = {"mlp": planted.recall_layer, "attention": planted.mover_layer}
        for name, site, layer, aie, ratio in peaks(curves(planted, seed, tuple(given.corruptions))):
            print(f"{seed:4} {name:18} {site:10} {true[site]:10} {layer:10} {aie:6.3f} {ratio:15.1f}", flush=True)


if __name__ == "__main__":
    main()
