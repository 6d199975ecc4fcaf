"""The ablation loss gap of every component under every ablation type, on held-out prompts.

gap = E_x KL(M(x) || M_ablated(x)) at the last position, in nats (Li & Janson 2024, section 2). All types share each batch's clean
pass. Whatever is random is drawn per prompt from the seed, so no result depends on the size of the batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from oacore.ablation import (
    Batch,
    Clean,
    Component,
    Group,
    Statistics,
    ablated_logits,
    clean_log_probs,
    clean_pass,
    derangement,
    group_components,
    spread,
)
from oacore.config import Method
from oacore.metrics import kl_divergence, mean_and_se
from oacore.model import Model
from oacore.progress import progress
from oacore.resume import Kept

RESAMPLED: set[Method] = {"resample", "resample_positional"}
NOISE_SCALE = 3.0  # standard deviations of gaussian ablation, as in causal tracing


@torch.no_grad()
def evaluate(
    model: Model,
    components: Sequence[Component],
    methods: Sequence[Method],
    statistics: Statistics,
    constants: dict[Method, Tensor],
    prompts: Batch,
    counterfactual: Batch,
    *,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    kept: Kept | None = None,
    what: str = "gaps",
) -> dict[Method, Tensor]:
    """Gap of each component on each prompt.

    Args:
        constants: [C, 1, W] of `optimal`, [C, P + 1, W] of `optimal_positional`.
        prompts: at least two, because resampling takes another prompt's value.
        counterfactual: row by row of the same lengths.
        kept: what goes on from an earlier call; removed by the caller when its result is safe.

    Returns:
        method -> [C, N] nats.
    """
    n, n_tokens = prompts.tokens.shape
    generator = torch.Generator().manual_seed(seed)
    partner = derangement(n, generator).to(model.device)
    draws = torch.rand(n, n_tokens, generator=generator).to(model.device)  # in [0, 1): which position a shuffled resample takes
    kept = kept or Kept(None)
    state = kept.load() or {"prompts": torch.tensor(0)} | {method: torch.zeros(len(components), n) for method in methods}
    gaps = {method: state[method] for method in methods}
    size = max(1, tokens_per_batch // n_tokens)

    def clean_of(batch: Batch) -> Clean:
        return clean_pass(model, batch.tokens, batch.lengths)

    for start in progress(range(int(state["prompts"]), n, size), what=what, unit="batches"):
        rows = torch.arange(start, min(start + size, n), device=model.device)
        part = prompts.take(rows)
        clean = clean_of(part)
        target = clean_log_probs(model, clean)
        other = clean_of(prompts.take(partner[rows])) if RESAMPLED & set(methods) else None
        sources = _Sources(
            statistics,
            constants,
            clean,
            counterfactual=clean_of(counterfactual.take(rows)) if "counterfactual" in methods else None,
            other=other,
            draws=draws[rows, : part.tokens.shape[1]],
            streams=[(seed, row) for row in rows.tolist()],
        )
        side_by_side, first = max(1, tokens_per_batch // part.tokens.numel()), 0
        for group in group_components(components):
            for chunk in group.chunks(side_by_side):
                for method in methods:
                    logits = ablated_logits(model, clean, chunk, sources.replacement(method, chunk, first))
                    gaps[method][first : first + len(chunk), rows.cpu()] = kl_divergence(target, logits).cpu()
                first += len(chunk)
        kept.save(state | {"prompts": torch.tensor(start + len(rows))})
        del clean, other, sources  # or the next batch's clean passes would be held beside these
    return gaps


@dataclass(frozen=True)
class _Sources:
    """Where one batch's replacement values come from; B prompts, T tokens."""

    statistics: Statistics
    constants: dict[Method, Tensor]
    clean: Clean
    counterfactual: Clean | None
    other: Clean | None  # of each prompt's partner
    draws: Tensor  # [B, T] in [0, 1)
    streams: list[tuple[int, int]]  # [B] seeds of the prompts' own random numbers

    def replacement(self, method: Method, group: Group, first: int) -> Tensor:
        """Replacement values [n, B or 1, T or 1, w] of a group whose first component is row `first` of the constants."""
        statistics, n_tokens = self.statistics, self.draws.shape[1]
        match method:
            case "zero":
                return torch.zeros((), device=self.draws.device).expand(len(group), 1, 1, 1)
            case "mean":
                return statistics.of(statistics.mean, group)[:, None, None]
            case "mean_positional":
                return spread(statistics.of(statistics.mean_positional, group), n_tokens)
            case "cf_mean":
                return spread(statistics.of(statistics.cf_mean, group), n_tokens)
            case "counterfactual":
                assert self.counterfactual is not None
                return self.counterfactual.value(group)
            case "resample":
                return self._of_partner(group, 1 + (self.draws * self._ends).long().minimum(self._ends - 1))
            case "resample_positional":
                return self._of_partner(group, torch.arange(n_tokens, device=self.draws.device).minimum(self._ends))
            case "gaussian":
                value = self.clean.value(group)
                sigma = statistics.of(statistics.std, group)[:, None, None]  # [n, 1, 1, w]
                return value + NOISE_SCALE * sigma * self._noise(value, first)
            case "optimal":
                w = statistics.of(statistics.mean, group).shape[-1]
                return self.constants[method][first : first + len(group), :, :w][:, None]
            case "optimal_positional":
                w = statistics.of(statistics.mean, group).shape[-1]
                return spread(self.constants[method][first : first + len(group), :, :w], n_tokens)

    @property
    def _ends(self) -> Tensor:
        """Last position of each prompt's partner [B, 1]."""
        assert self.other is not None
        return self.other.last[:, None]

    def _of_partner(self, group: Group, positions: Tensor) -> Tensor:
        """The partner's value at positions [B, T]: [n, B, T, w]."""
        assert self.other is not None
        return self.other.value(group)[:, torch.arange(len(positions), device=positions.device)[:, None], positions]

    def _noise(self, value: Tensor, first: int) -> Tensor:
        """Standard normal noise like value [n, B, T, w], from a stream of its own per prompt and component."""
        noise = torch.empty(value.shape, dtype=torch.float32)
        for i, j in np.ndindex(*value.shape[:2]):
            stream = np.random.default_rng((*self.streams[j], first + i))
            noise[i, j] = torch.from_numpy(stream.standard_normal(value.shape[2:], dtype=np.float32))
        return noise.to(value.device)


def gap_table(components: Sequence[Component], gaps: dict[Method, Tensor]) -> pd.DataFrame:
    """Tidy table: component, kind, layer, head, method, gap_nats, se_nats, n_prompts."""
    rows = []
    for method, values in gaps.items():
        mean, se = mean_and_se(values)
        for component, gap, error in zip(components, mean.tolist(), se.tolist(), strict=True):
            head = component.head if component.kind == "head" else None
            rows.append((component.name, component.kind, component.layer, head, method, gap, error, values.shape[1]))
    table = pd.DataFrame(rows, columns=["component", "kind", "layer", "head", "method", "gap_nats", "se_nats", "n_prompts"])
    return table.astype({"head": "Int64"})


def summary_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """Per method: Spearman rank correlation with the counterfactual gap, and the median over components of gap(optimal) / gap(method).

    A column is empty where the table lacks what it compares with; components whose gap is not positive have no ratio.
    """
    wide = gaps.pivot(index="component", columns="method", values="gap_nats")
    rows = []
    for method in gaps["method"].unique():
        rank = spearmanr(wide[method], wide["counterfactual"]).statistic if "counterfactual" in wide else None
        positive = wide[method] > 0
        ratio = (wide["optimal"] / wide[method])[positive].median() if "optimal" in wide else None
        rows.append((method, rank, ratio))
    return pd.DataFrame(rows, columns=["method", "spearman_with_counterfactual", "median_ratio_optimal_to_method"])
