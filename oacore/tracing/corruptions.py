"""What replaces a subject's token embeddings: one function for each corruption that `oacore.config.tracing` lists.

Noise and means spoof: they tell the model something wrong about the subject. Optimal ablation (OAT) takes the constant
with which the answer loses the least probability, see `oacore.tracing.fit`.

Each takes what a corruption is made from, the facts and the number of the draw, and returns the residual that enters
block 0: [B, T, d], or [n, B, T, d] of n places that have constants of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from oacore.config.tracing import CORRUPTIONS, kind_and_scale
from oacore.engine.forward import add_positions, embed_tokens
from oacore.models.weights import Model
from oacore.tracing.fit import PlaceConstants
from oacore.tracing.recall import Recall, embedded
from oacore.tracing.subjects import SubjectStatistics


@dataclass(frozen=True)
class SubjectSources:
    """What corruptions of subjects are made from."""

    model: Model
    statistics: SubjectStatistics
    constant: Tensor  # fitted: [d], or [n, 1, 1, d] of places; empty for corruptions without one
    scale: float  # of noise, in standard deviations; NaN without noise
    seed: int  # of noise

    def noise(self, recall: Recall, draw: int) -> Tensor:
        """Standard normal noise [B, T, d] at the subjects' tokens, from a stream of its own per fact and draw.

        It depends on neither the batch nor where in the prompt the subject is, and is the same at every scale.
        """
        values = torch.zeros(*recall.tokens.shape, self.model.d_model)
        for row, fact in enumerate(recall.numbers.tolist()):
            first, end = recall.subject[row].tolist()
            stream = np.random.default_rng((self.seed, fact, draw))
            normal = stream.standard_normal((end - first, self.model.d_model), dtype=np.float32)
            values[row, first:end] = torch.from_numpy(normal)
        return values.to(recall.tokens.device)


def constant(sources: SubjectSources, recall: Recall, draw: int) -> Tensor:
    """A fitted constant at every subject token."""
    return embedded(sources.model, recall, sources.constant)


def gaussian(sources: SubjectSources, recall: Recall, draw: int) -> Tensor:
    """The subject's own embeddings and noise, of the scale times each coordinate's standard deviation."""
    return _noisy(sources, recall, draw, sources.scale * sources.statistics.std)


def gaussian_scalar(sources: SubjectSources, recall: Recall, draw: int) -> Tensor:
    """The same with one standard deviation for all coordinates, as in ROME."""
    return _noisy(sources, recall, draw, sources.scale * sources.statistics.scalar_std)


def _noisy(sources: SubjectSources, recall: Recall, draw: int, sigma: Tensor | float) -> Tensor:
    clean = embed_tokens(sources.model, recall.tokens)
    return embedded(sources.model, recall, clean + sigma * sources.noise(recall, draw))


def mean(sources: SubjectSources, recall: Recall, draw: int) -> Tensor:
    """The mean embedding of the training facts' subject tokens."""
    return embedded(sources.model, recall, sources.statistics.mean)


def token_replacement(sources: SubjectSources, recall: Recall, draw: int) -> Tensor:
    """Another subject of the same length."""
    return add_positions(sources.model, embed_tokens(sources.model, recall.other))


@dataclass(frozen=True)
class Corruptor:
    """A corruption, ready to be run on facts."""

    residuals: Callable[[SubjectSources, Recall, int], Tensor]
    sources: SubjectSources
    n_draws: int = 1
    per_place: bool = False

    def __call__(self, recall: Recall, draw: int) -> Tensor:
        """The residuals [B, T, d] that enter block 0, the same for all places."""
        return self.residuals(self.sources, recall, draw)

    def of_places(self, rows: slice, recall: Recall, draw: int) -> Tensor:
        """The residuals [n, B, T, d] that enter block 0 for these of the places, each with its constant."""
        return self.residuals(replace(self.sources, constant=self.sources.constant[rows]), recall, draw)


def corruptor(
    name: str, model: Model, statistics: SubjectStatistics, constants: PlaceConstants, seed: int, n_draws: int
) -> Corruptor:
    """A corruption by its name in the tables, such as `mean` or `gaussian-3`.

    Args:
        constants: the fitted ones of n places and, last, of the corrupted run, or of that alone; not read by a
            corruption that takes none.
        seed, n_draws: of noise.
    """
    kind, scale = kind_and_scale(name)
    row, fitted = CORRUPTIONS[kind], torch.empty(0)
    match row.constants:
        case "shared":
            fitted = constants.cautious[-1]
        case "own" | "cautious":
            fitted = (constants.own if row.constants == "own" else constants.cautious)[:, None, None]
    sources = SubjectSources(model, statistics, fitted, scale, seed)
    return Corruptor(row.load(), sources, n_draws if row.scaled else 1, row.per_place)
