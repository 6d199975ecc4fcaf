"""Causal faithfulness of lenses: does a lens react as the model does when the residual is changed? (Li & Janson 2024,
section 6)

The residual entering a layer at the last position is changed along random directions, or along those that the lens
reacts to most, and the change of the lens's distribution is compared with that of the model's: do they go the same way
(Aitchison similarity), and is what moves the one what moves the other (correlation of log KLs)?

Directions live in whitened space, where the training residuals have unit covariance: x = mu + A z, A symmetric.

Symbols: P perturbations, B prompts, d model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.draws import derangement
from oacore.engine.clean import Batch, clean_pass
from oacore.engine.forward import at, key_value, logits_of, run_block_at
from oacore.lenses.lens import Lens
from oacore.lenses.numbers import BISECTIONS
from oacore.metrics import RESOLUTION, kl_divergence
from oacore.models.weights import Model
from oacore.progress import progress

RIDGE = 3e-4  # of the mean variance, on the covariance's diagonal
# root mean square log-ratio; a higher one cuts through real changes, whose similarity would flip by rounding
SMALLEST_CHANGE = 1e-7
SMALLEST_MOVE = 1e-5  # of a residual's norm
N_JACOBIAN = 64  # training rows over which a lens is linearised
N_BOOTSTRAP = 1000
MEASURES = ("similarity", "correlation", "direction_correlation")


class Continuation:
    """The model's own reaction to a changed residual at the last position.

    Earlier positions can't see the last one: their keys and values are those of the clean run, computed once.
    """

    def __init__(self, model: Model, batch: Batch):
        clean = clean_pass(model, batch.tokens, batch.lengths)
        self.model, self.last = model, clean.last
        self.entering = [at(residual, clean.last)[:, 0] for residual in clean.entering]  # L + 1 of [B, d]
        with torch.no_grad():
            self.key_value = [key_value(model, layer, residual) for layer, residual in enumerate(clean.entering[:-1])]

    @torch.no_grad()
    def logits(self, residual: Tensor, layer: int) -> Tensor:
        """Logits [P, B, V] when the residual entering block `layer` is [P, B, d]."""
        n = len(residual)
        rows, last = residual.flatten(0, 1)[:, None], self.last.repeat(n)  # [P B, 1, d]
        for index in range(layer, self.model.n_layers):
            keys, values = (tensor.repeat(n, 1, 1, 1) for tensor in self.key_value[index])
            rows = run_block_at(self.model, index, rows, keys, values, last)
        return logits_of(self.model, rows[:, 0]).unflatten(0, (n, -1))


@dataclass(frozen=True)
class Whitening:
    """Mean and covariance of residuals [N, d], as factors in float64."""

    mean: Tensor  # [d]
    factor: Tensor  # A [d, d], symmetric
    inverse: Tensor  # [d, d]

    @classmethod
    def of(cls, residual: Tensor) -> "Whitening":
        """The moments of residuals [N, d], with a ridge on the covariance."""
        wide = residual.double()
        centred = wide - wide.mean(0)
        covariance = centred.T @ centred / len(wide)
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=0) + RIDGE * covariance.diagonal().mean()
        return cls(wide.mean(0), axes * variances.sqrt() @ axes.T, axes / variances.sqrt() @ axes.T)


def lens_jacobian(lens: Lens, residual: Tensor, layer: int) -> Tensor:
    """Mean over rows [N, d] of d(predicted residual after all blocks) / d(residual): [d, d], out last."""
    leaf = residual.detach().requires_grad_()
    with torch.enable_grad():
        out = lens.final(leaf, layer)
        if out is leaf:
            return torch.eye(residual.shape[1], dtype=torch.float64, device=residual.device)
        slopes = [
            torch.autograd.grad(out[:, k].sum(), leaf, retain_graph=True)[0].double().mean(0)
            for k in range(out.shape[1])
        ]
    return torch.stack(slopes, 1)


def singular_directions(lens: Lens, whitening: Whitening, residual: Tensor, layer: int) -> Tensor:
    """Unit vectors of whitened space [d, d], one a row, along which the linearised lens moves its prediction most,
    strongest first.

    With changes as rows, dy = dz A J: they are the left singular vectors of A J. (The research code takes the other
    factor's.)
    """
    jacobian = lens_jacobian(lens, residual[:N_JACOBIAN], layer)
    return torch.linalg.svd(whitening.factor @ jacobian)[0].T


def random_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Unit vectors of whitened space [n, d]."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def project_out(residual: Tensor, whitening: Whitening, directions: Tensor) -> Tensor:
    """Each row [B, d] without its component about the mean along each direction [P, d]: [P, B, d]."""
    share = (residual.double() - whitening.mean) @ whitening.inverse @ directions.T  # [B, P]
    return (residual - share.T[..., None] * (directions @ whitening.factor)[:, None]).to(residual.dtype)


def steer(residual: Tensor, whitening: Whitening, directions: Tensor, amounts: Tensor) -> Tensor:
    """Each row [B, d] moved along each direction [P, d] by amounts [P, B] in whitened units: [P, B, d]."""
    return (residual + amounts[..., None] * (directions @ whitening.factor)[:, None]).to(residual.dtype)


def resample_subspace(residual: Tensor, whitening: Whitening, subspace: Tensor, partners: Tensor) -> Tensor:
    """Each row [B, d] with its part in a subspace, spanned by orthonormal rows [n, d], replaced by that of partners [P,
    B]: [P, B, d].
    """
    onto = whitening.inverse @ subspace.T @ subspace @ whitening.factor  # [d, d]
    return (residual + (residual[partners] - residual).double() @ onto).to(residual.dtype)


def aitchison_similarity(before: Tensor, after: Tensor, other_before: Tensor, other_after: Tensor) -> Tensor:
    """Cosine of two changes of distribution in Aitchison's geometry, weighted by the distribution `before`: [...] in
    [-1, 1].

    All arguments are logits or log-probabilities [..., V] that broadcast; a constant added to any of them changes
    nothing. 1 where neither changes, 0 where one of them does not.
    """
    weights = before.double().softmax(-1)

    def change(first: Tensor, second: Tensor) -> Tensor:
        moved = second.double() - first.double()
        return moved - (weights * moved).sum(-1, keepdim=True)

    one, two = change(before, after), change(other_before, other_after)
    inner = (weights * one * two).sum(-1)
    norms = [(weights * moved.square()).sum(-1).sqrt() for moved in (one, two)]
    still = [norm < SMALLEST_CHANGE for norm in norms]
    cosine = (inner / (norms[0] * norms[1]).clamp(min=SMALLEST_CHANGE**2)).clamp(-1, 1)
    return torch.where(still[0] & still[1], 1.0, torch.where(still[0] | still[1], 0.0, cosine))


@dataclass(frozen=True)
class Reactions:
    """Of P perturbations of B prompts."""

    similarity: np.ndarray  # [P, B]
    log_kl_model: np.ndarray  # [P, B]
    log_kl_lens: np.ndarray  # [P, B]
    # bool [P, B]; others don't count: a prompt whose partner has the same residual is not perturbed by it.
    changed: np.ndarray

    def row(self, seed: int) -> dict[str, float]:
        """Three measures with 95 % intervals, by bootstrap over perturbations and, independently, prompts.

        `similarity`: its mean; `correlation`: of the log KLs of all pairs of a perturbation and a prompt;
        `direction_correlation`: of their means over prompts, as the authors take it.
        """
        counted = self.changed.astype(float)
        # About their means: the variance of equal values is then 0, and not what squares of 20 leave of their
        # difference.
        x, y = (v - v[self.changed].mean() if self.changed.any() else v for v in (self.log_kl_model, self.log_kl_lens))
        moments = np.stack([v * counted for v in (counted, self.similarity, x, y, x * x, y * y, x * y)])  # [7, P, B]
        rng = np.random.default_rng(seed)
        P, B = counted.shape
        # How often each perturbation and each prompt is drawn: once as they are, and so many times anew.
        drawn = [rng.multinomial(size, np.full(size, 1 / size), N_BOOTSTRAP) for size in (P, B)]
        values, several = _measures(moments, np.ones((1, P)), np.ones((1, B))), _measures(moments, *drawn)
        row: dict[str, float] = {}
        for name, (value,), draws in zip(MEASURES, values, several, strict=True):
            known = draws[np.isfinite(draws)]
            low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
            row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
        return row | {"n": int(counted.sum())}


def _measures(moments: np.ndarray, of_perturbations: np.ndarray, of_prompts: np.ndarray) -> np.ndarray:
    """`MEASURES` [3, R] with weights [R, P] and [R, B], from the moments [7, P, B]."""
    by_direction = np.einsum("kpb,rb->krp", moments, of_prompts)  # [7, R, P]
    sums = (by_direction * of_perturbations).sum(-1)  # [7, R]
    n, x, y = by_direction[[0, 2, 3]]
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing counted, or nothing that varies: NaN
        x, y, weights = np.where(n > 0, x / n, 0), np.where(n > 0, y / n, 0), of_perturbations * (n > 0)
        means = np.stack([(v * weights).sum(-1) for v in (x, y, x * x, y * y, x * y)]) / weights.sum(-1)
        return np.stack([sums[1] / sums[0], _correlation(*sums[2:] / sums[0]), _correlation(*means)])


def _correlation(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """From the means of two variables, of their squares and of their product; NaN where one does not vary."""
    spread = np.sqrt(np.clip(xx - x**2, 0, None) * np.clip(yy - y**2, 0, None))
    return np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)


class _Layer:
    """All perturbations of one layer."""

    def __init__(self, continuation: Continuation, layer: int, train: Tensor, parts: int):
        self.continuation, self.layer, self.train, self.parts = continuation, layer, train, parts
        self.residual = continuation.entering[layer]  # [B, d]
        self.before = logits_of(continuation.model, continuation.entering[-1]).double().log_softmax(-1)  # [B, V]
        self.whitening = Whitening.of(train)

    def model_after(self, changed: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The model's log-probabilities [p, B, V] for some of the changed residuals [P, B, d] at a time."""
        for start in range(0, len(changed), self.parts):
            part = slice(start, start + self.parts)
            yield part, self.continuation.logits(changed[part], self.layer).double().log_softmax(-1)

    def magnitude(self, move: Callable[[float], Tensor], target_kl: float) -> float:
        """The size at which the model's mean KL is the target; `move` gives the changed residuals of a size."""
        low, high = np.log(1e-3), np.log(1e3)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            kl = torch.cat(
                [kl_divergence(self.before, after) for _, after in self.model_after(move(float(np.exp(middle))))]
            )
            low, high = (middle, high) if float(kl.mean()) < target_kl else (low, middle)
        return float(np.exp((low + high) / 2))

    def reactions(self, lenses: Sequence[Lens], changed: Tensor) -> list[Reactions]:
        """Of each lens, to the same changes [P, B, d]; the model runs once."""
        befores = [lens.logits(self.residual, self.layer).double().log_softmax(-1) for lens in lenses]
        measured: list[list[Tensor]] = [[] for _ in lenses]
        for part, after in self.model_after(changed):
            kl = kl_divergence(self.before, after)
            for of_lens, lens, before in zip(measured, lenses, befores, strict=True):
                lens_after = lens.logits(changed[part], self.layer).double().log_softmax(-1)
                similarity = aitchison_similarity(self.before, after, before, lens_after)
                of_lens.append(torch.stack((similarity, kl, kl_divergence(before, lens_after))))
        moved = (changed - self.residual).norm(dim=-1) > SMALLEST_MOVE * self.residual.norm(dim=-1)  # [P, B]
        tables = [torch.cat(of_lens, 1).cpu().numpy() for of_lens in measured]
        logs = [np.log(np.clip(table[1:], RESOLUTION, None)) for table in tables]
        return [
            Reactions(table[0], log[0], log[1], moved.cpu().numpy()) for table, log in zip(tables, logs, strict=True)
        ]


@torch.no_grad()
def faithfulness_table(
    model: Model,
    lenses: Sequence[Lens],
    batch: Batch,
    train_residual: Tensor,
    layers: Sequence[int],
    *,
    n_directions: int = 20,
    resample_sizes: Sequence[int] = (5, 20, 100),
    target_kl: float = 0.2,
    seed: int = 0,
    tokens_per_batch: int = 16384,
) -> pd.DataFrame:
    """How lenses react beside the model, one row per lens, layer and perturbation.

    Random directions are the same for all lenses of a layer, singular ones each lens's own. Perturbations: `project_*`
    removes a direction's component about the mean, `steer_*` adds it with a normal amount whose scale makes the model's
    mean KL `target_kl`, and `resample_n` replaces the part in the n strongest singular directions by another prompt's.

    Args:
        batch: prompts, at least 2, changed at their last position.
        train_residual: [N, L, d], by which directions are whitened and lenses linearised.
    """
    continuation, d, size = Continuation(model, batch), model.d_model, len(batch)
    parts = max(1, tokens_per_batch // batch.tokens.numel())
    rows: list[dict[str, object]] = []
    for layer in progress(layers, what="faithfulness", unit="layers"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        here = _Layer(continuation, layer, train_residual[:, layer], parts)
        amounts = torch.randn(n_directions, size, generator=generator, dtype=torch.float64).to(model.device)
        partners = torch.stack([derangement(size, generator) for _ in range(n_directions)]).to(model.device)
        of_all = random_directions(n_directions, d, generator).to(model.device)

        def along(directions: Tensor, here: _Layer = here, amounts: Tensor = amounts) -> dict[str, Tensor]:
            def move(scale: float) -> Tensor:
                return steer(here.residual, here.whitening, directions, scale * amounts[: len(directions)])

            projected = project_out(here.residual, here.whitening, directions)
            return {"project": projected, "steer": move(here.magnitude(move, target_kl))}

        groups: list[tuple[str, Sequence[Lens], Tensor]] = [
            (f"{kind}_random", lenses, x) for kind, x in along(of_all).items()
        ]
        for lens in lenses:
            strongest = singular_directions(lens, here.whitening, here.train, layer)
            groups += [(f"{kind}_singular", [lens], x) for kind, x in along(strongest[:n_directions]).items()]
            for n in dict.fromkeys(min(n, d) for n in resample_sizes):
                groups.append(
                    (f"resample_{n}", [lens], resample_subspace(here.residual, here.whitening, strongest[:n], partners))
                )
        for name, some, changed in groups:
            for lens, reactions in zip(some, here.reactions(some, changed), strict=True):
                rows.append(
                    {"lens": lens.name, "init": lens.init, "layer": layer, "perturbation": name} | reactions.row(seed)
                )
    return pd.DataFrame(rows)
