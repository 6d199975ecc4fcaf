"""The ablation loss gap of every component under every ablation type, on held-out prompts.

gap = E_x KL(M(x) || M_ablated(x)) at the last position, in nats (Li & Janson 2024, section 2). All types share each
batch's clean pass. Whatever is random is drawn per prompt from the seed, so no result depends on the size of the
batches.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.ablation.ablate import ablated_logits
from oacore.ablation.components import Component, group_components
from oacore.ablation.replacements import Sources
from oacore.config.ablation import ABLATION_TYPES, Method
from oacore.draws import derangement
from oacore.engine.clean import Batch, Clean, clean_log_probs, clean_pass
from oacore.engine.statistics import Statistics
from oacore.fits.convergence import UNFITTED, OfFits, columns_in, typed
from oacore.fits.resume import NOT_KEPT, Resumable
from oacore.metrics import clustered_means_and_ses, kl_divergence
from oacore.models.weights import Model
from oacore.progress import progress

SUMMARY_RATIOS = ("optimal", "optimal_positional")  # what all methods are compared with


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
    resumable: Resumable = NOT_KEPT,
    what: str = "gaps",
) -> dict[Method, Tensor]:
    """Gap of each component on each prompt.

    Args:
        constants: [C, 1, W] of `optimal`, [C, P + 1, W] of `optimal_positional`.
        prompts: at least two, because resampling takes another prompt's value.
        counterfactual: row by row of the same lengths.
        resumable: where the gaps of the prompts so far are kept.

    Returns:
        method -> [C, N] nats.
    """
    n, n_tokens = prompts.tokens.shape
    types = [ABLATION_TYPES[method] for method in methods]
    replacements = {row.name: row.load() for row in types}
    of_partner, of_counterfactual = any(row.of_partner for row in types), any(row.of_counterfactual for row in types)
    partner, draws = _drawn(n, n_tokens, seed, model.device)
    state = resumable.load() or {"prompts": torch.tensor(0)} | {
        method: torch.zeros(len(components), n) for method in methods
    }
    gaps = {method: state[method] for method in methods}
    size = max(1, tokens_per_batch // n_tokens)

    for start in progress(range(int(state["prompts"]), n, size), what=what, unit="batches"):
        rows = torch.arange(start, min(start + size, n), device=model.device)
        part = prompts.take(rows)
        clean = _clean_of(model, part)
        target = clean_log_probs(model, clean)
        sources = Sources(
            statistics,
            constants,
            clean,
            partner=_clean_of(model, prompts.take(partner[rows])) if of_partner else None,
            counterfactual=_clean_of(model, counterfactual.take(rows)) if of_counterfactual else None,
            draws=draws[rows, : part.tokens.shape[1]],
            streams=[(seed, row) for row in rows.tolist()],
        )
        side_by_side, first = max(1, tokens_per_batch // part.tokens.numel()), 0
        for group in group_components(components):
            for chunk in group.chunks(side_by_side):
                for method, replacement in replacements.items():
                    logits = ablated_logits(model, clean, chunk, replacement(sources, chunk, first))
                    gaps[method][first : first + len(chunk), rows.cpu()] = kl_divergence(target, logits).cpu()
                first += len(chunk)
        resumable.save_sometimes(state | {"prompts": torch.tensor(start + len(rows))})
        del clean, sources  # or the next batch's clean passes would be held beside these
    return gaps


def _drawn(n: int, n_tokens: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompt [n] that each takes values of when it is resampled, and numbers [n, T] in [0, 1) for its positions."""
    generator = torch.Generator().manual_seed(seed)
    return derangement(n, generator).to(device), torch.rand(n, n_tokens, generator=generator).to(device)


def _clean_of(model: Model, batch: Batch) -> Clean:
    return clean_pass(model, batch.tokens, batch.lengths)


def gap_table(
    components: Sequence[Component],
    gaps: dict[Method, Tensor],
    clusters: np.ndarray,
    fits: Mapping[Method, OfFits] | None = None,
) -> pd.DataFrame:
    """Tidy table: component, kind, layer, head, method, gap_nats, se_nats, n_prompts, converged, steps, left_nats.

    Args:
        clusters: [N], `Prompts.cluster` of the prompts: what standard errors are over.
        fits: of the methods whose constants were fitted; the last three columns are empty for others.
    """
    rows = []
    for method, values in gaps.items():
        mean, se = clustered_means_and_ses(values, clusters)
        of_method = (fits or {}).get(method, {})
        for component, gap, error in zip(components, mean.tolist(), se.tolist(), strict=True):
            head = component.head if component.kind == "head" else None
            named = (component.name, component.kind, component.layer, head, method)
            fit = of_method.get(component.name, UNFITTED)
            rows.append((*named, gap, error, values.shape[1], *fit))
    columns = ["component", "kind", "layer", "head", "method", "gap_nats", "se_nats", "n_prompts"]
    return typed(pd.DataFrame(rows, columns=[*columns, *columns_in("nats")]).astype({"head": "Int64"}))


def summary_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """Per method: Spearman rank correlation with the counterfactual gap, and the medians over components of
    gap(optimal) / gap(method) and gap(optimal_positional) / gap(method).

    The first ratio is like for like where values are the same at all positions, the second where they follow the
    position; the paper's figures are of the second kind. A column is empty where the table lacks what it compares with;
    components whose gap is not positive have no ratio.
    """
    wide = gaps.pivot(index="component", columns="method", values="gap_nats")
    ranks = wide.corr(method="spearman")  # pandas' own: importing scipy.stats takes 0.6 s of every such job
    rows = []
    for method in gaps["method"].unique():
        rank = ranks.loc[method, "counterfactual"] if "counterfactual" in wide else None
        positive = wide[method] > 0
        ratios = [
            (wide[optimal] / wide[method])[positive].median() if optimal in wide else None for optimal in SUMMARY_RATIOS
        ]
        rows.append((method, rank, *ratios))
    columns = [f"median_ratio_{optimal}_to_method" for optimal in SUMMARY_RATIOS]
    return pd.DataFrame(rows, columns=["method", "spearman_with_counterfactual", *columns])
