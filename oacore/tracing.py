"""Causal tracing: where in the model is a fact recalled? (Meng et al. 2022; with optimal ablation, Li & Janson 2024, section 5)

Three runs of a prompt: clean; corrupted, with the subject's token embeddings replaced; and corrupted with one place restored to what it
was in the clean run. The average indirect effect (AIE) of a place is how much of the answer's probability that brings back.

A place is what one site (attention output, MLP output, whole block) writes in a window of consecutive layers at some positions. All
places of a batch go through the model side by side: one clean pass serves them all, and where they share their corruption one corrupted
pass too, which each leaves at the first layer that it restores.

Symbols: n places, B facts, T tokens, M answer tokens, d model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from oacore.ablation import Clean, clean_pass
from oacore.config import AnswerKind, Position, Site
from oacore.forward import add_positions, at, attention_write, combine_heads, embed_tokens, heads, logits_of, mlp, run_block
from oacore.metrics import PROBABILITY_RESOLUTION, clustered_mean_and_se, zero_below
from oacore.model import Model
from oacore.tasks.prompts import Prompts


@dataclass(frozen=True, order=True)
class Place:
    """What `site` writes in layers `first` to `last`, both included, at a kind of position or at one token of every prompt."""

    site: Site
    position: Position | int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.site}.{self.position}.{self.first}-{self.last}" if self.first <= self.last else "corrupted"


NOWHERE = Place("block", "last", 0, -1)  # restores nothing: the corrupted run


def window(layer: int, width: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window of `width` (odd) around a layer, clipped at both ends of the model."""
    reach = width // 2
    return max(0, layer - reach), min(n_layers - 1, layer + reach)


def place(site: Site, position: Position | int, layer: int, width: int, n_layers: int) -> Place:
    """The place around `layer`. Clipped windows of neighbouring layers can be the same place."""
    return Place(site, position, *window(layer, width, n_layers))


@dataclass(frozen=True)
class Recall:
    """Facts that the model completes: right-padded prompts, each followed by its answer's tokens but the last."""

    tokens: Tensor  # [B, T]
    lengths: Tensor  # [B]
    last: Tensor  # [B] position of the prompt's last token, where the answer's first token is predicted
    subject: Tensor  # [B, 2] half-open span of positions
    answer: Tensor  # [B, M], padded with -1
    other: Tensor  # [B, T] the same about another subject of the same length

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor | slice) -> "Recall":
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        tokens, other = self.tokens[rows][:, :longest], self.other[rows][:, :longest]
        return Recall(tokens, lengths, self.last[rows], self.subject[rows], self.answer[rows], other)

    def split(self, tokens_per_batch: int) -> "Iterator[Recall]":
        size = max(1, tokens_per_batch // self.tokens.shape[1])
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    @property
    def in_subject(self) -> Tensor:
        """[B, T] bool."""
        return self.at_positions("all_subject")

    @property
    def subject_numbers(self) -> np.ndarray:
        """[B] the same for facts about the same subject, by its tokens."""
        seen: dict[tuple[int, ...], int] = {}
        spans = [tuple(tokens[first:end]) for tokens, (first, end) in zip(self.tokens.tolist(), self.subject.tolist(), strict=True)]
        return np.array([seen.setdefault(span, len(seen)) for span in spans])

    def at_positions(self, position: Position | int) -> Tensor:
        """Which tokens a kind of position means: [B, T] bool."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        match position:
            case "last":
                return index == self.last[:, None]
            case "last_subject":
                return index == self.subject[:, 1:] - 1
            case "all_subject":
                return (index >= self.subject[:, :1]) & (index < self.subject[:, 1:])
            case int():
                return (index == position).expand(len(self), -1)


def recall_of(prompts: Prompts, answer: AnswerKind, device: torch.device | str = "cpu") -> Recall:
    """A split of the facts task. `answer`: "first_token" of the answer, or "joint": all of them, each after those before it."""
    lengths = torch.from_numpy(prompts.lengths).long()
    ids = torch.from_numpy(prompts.continuation).long()
    ids = ids[:, :1] if answer == "first_token" else ids
    count = (ids >= 0).sum(1)  # [B]
    tokens, other = (torch.from_numpy(array).long() for array in (prompts.tokens, prompts.counterfactual))
    if ids.shape[1] > 1:
        longest = int((lengths + count - 1).max())
        tokens, other = (torch.nn.functional.pad(x, (0, max(0, longest - x.shape[1]))) for x in (tokens, other))
        for k in range(ids.shape[1] - 1):
            rows = (k + 1 < count).nonzero()[:, 0]  # the answer's last token is predicted, never read
            tokens[rows, lengths[rows] + k] = ids[rows, k]
            other[rows, lengths[rows] + k] = ids[rows, k]
    parts = (tokens, lengths + count - 1, lengths - 1, torch.from_numpy(prompts.subject).long(), ids, other)
    return Recall(*(part.to(device) for part in parts))


def answer_probability(model: Model, recall: Recall, residual: Tensor) -> Tensor:
    """Probability of each fact's answer [..., B]: of all its tokens together.

    Args:
        residual: after all blocks, [..., B, T, d], or [..., B, 1, d] at the prompt's last position where answers have one token.
    """
    log_probs, _ = _answer(model, recall, residual)
    return log_probs.exp()


@torch.no_grad()
def completes(model: Model, recall: Recall, tokens_per_batch: int) -> Tensor:
    """Which facts [B] the model completes: greedy decoding gives every token of the answer."""
    found = []
    for part in recall.split(tokens_per_batch):
        clean = clean_pass(model, part.tokens, part.lengths)
        found.append(_answer(model, part, clean.entering[-1])[1])
    return torch.cat(found)


def _answer(model: Model, recall: Recall, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [..., B] of the answers, and whether each of their tokens is the most likely one [..., B]."""
    n_answers = recall.answer.shape[1]
    if residual.shape[-2] > 1 or n_answers > 1:
        reads = (recall.last[:, None] + torch.arange(n_answers, device=residual.device)).clamp(max=residual.shape[-2] - 1)  # [B, M]
        residual = residual[..., torch.arange(len(recall), device=residual.device)[:, None], reads, :]  # [..., B, M, d]
    logits = logits_of(model, residual)  # [..., B, M, V]
    real, ids = recall.answer >= 0, recall.answer.clamp(min=0)
    picked = logits.gather(-1, ids.expand(logits.shape[:-1])[..., None])[..., 0] - logits.logsumexp(-1)
    return (picked * real).sum(-1), ((logits.argmax(-1) == ids) | ~real).all(-1)


def embedded(model: Model, recall: Recall, subject: Tensor) -> Tensor:
    """The residual entering block 0 with the subject's token embeddings replaced.

    Args:
        subject: broadcasts to [..., B, T, d]; read at the subject's positions alone.
    """
    clean = embed_tokens(model, recall.tokens)
    return add_positions(model, torch.where(recall.in_subject[..., None], subject.to(clean.dtype), clean))


def restored(model: Model, recall: Recall, clean: Clean, places: Sequence[Place], entering: Sequence[Tensor]) -> Tensor:
    """Probability of the answers [n, B] with each place restored.

    Args:
        entering: the corrupted run. Either one residual [n, B, T, d] that enters block 0, of corruptions of the places' own; or one
            [B, T, d] for each block and one after the last, of a corruption that they share.
    """
    shared = len(entering) > 1
    start = [0 if not shared else model.n_layers if item == NOWHERE else item.first for item in places]
    order = sorted(range(len(places)), key=start.__getitem__)
    where = torch.stack([recall.at_positions(places[i].position) for i in order])  # [n, B, T]
    batch, single = len(recall), recall.answer.shape[1] == 1
    residual = torch.empty(0, *clean.entering[0].shape, dtype=model.dtype, device=model.device)  # [m, B, T, d] of those under way
    for layer in range(model.n_layers + 1):
        joining = [i for i in order if start[i] == layer]
        if joining:
            arriving = entering[layer].expand(len(joining), -1, -1, -1) if shared else entering[0][joining]
            if layer == model.n_layers and single:
                arriving = at(arriving.flatten(0, 1), recall.last.repeat(len(joining))).unflatten(0, (-1, batch))
            residual = torch.cat((residual, arriving)) if len(residual) else arriving
        if layer < model.n_layers and len(residual):
            active = [places[i] for i in order[: len(residual)]]
            residual = _restored_block(model, recall, clean, layer, active, where[: len(residual)], residual, single)
    return answer_probability(model, recall, residual)[torch.argsort(torch.tensor(order)).to(model.device)]


def _restored_block(
    model: Model, recall: Recall, clean: Clean, layer: int, places: Sequence[Place], where: Tensor, residual: Tensor, single: bool
) -> Tensor:
    """One block for m places: residual [m, B, T, d], where [m, B, T]; where one position is read, the last block computes that alone."""
    m, batch = residual.shape[:2]
    rows = residual.flatten(0, 1)  # [m B, T, d]
    query = recall.last.repeat(m) if single and layer == model.n_layers - 1 else None

    def restore(site: Site, written: Tensor) -> Tensor:
        """written [m B, T or 1, d] with the clean run's in its place where the site is restored."""
        here = [item.site == site and item.first <= layer <= item.last for item in places]
        if not any(here):
            return written
        value = _clean_value(model, clean, site, layer)  # [B, T, d]
        mask = where & torch.tensor(here, device=where.device)[:, None, None]  # [m, B, T]
        if query is not None:
            value, mask = at(value, recall.last), at(mask.flatten(0, 1), query).unflatten(0, (m, batch))
        return torch.where(mask[..., None], value, written.unflatten(0, (m, batch))).flatten(0, 1)

    combined = combine_heads(model, layer, heads(model, layer, rows, query))
    rows = rows if query is None else at(rows, query)
    middle = rows + restore("attention", attention_write(model, layer, combined))
    out = restore("mlp", mlp(model, layer, rows if model.parallel else middle))
    return restore("block", middle + out).unflatten(0, (m, batch))


def _clean_value(model: Model, clean: Clean, site: Site, layer: int) -> Tensor:
    """What a site wrote in the clean run: [B, T, d]; a block's is the residual after it."""
    match site:
        case "attention":
            return attention_write(model, layer, clean.combined[layer])
        case "mlp":
            return clean.mlp[layer]
        case "block":
            return clean.entering[layer + 1]


@torch.no_grad()
def corrupted_run(model: Model, entering: Tensor) -> list[Tensor]:
    """The residuals [B, T, d] entering every block, and after the last, of a run that starts from the first of them."""
    run = [entering]
    for layer in range(model.n_layers):
        run.append(run_block(model, layer, run[-1]))
    return run


def in_parts(n: int, recall: Recall, tokens_per_batch: int) -> Iterator[slice]:
    """Slices of n places whose rows have at most `tokens_per_batch` tokens."""
    size = max(1, tokens_per_batch // recall.tokens.numel())
    return (slice(start, start + size) for start in range(0, n, size))


@torch.no_grad()
def restored_all(model: Model, recall: Recall, clean: Clean, places: Sequence[Place], entering: Tensor, tokens_per_batch: int) -> Tensor:
    """Probability of the answers [n, B] with each place restored in the run that starts from `entering` [B, T, d], some at a time."""
    run = corrupted_run(model, entering)
    parts = sorted(range(len(places)), key=lambda i: places[i].first)  # those of one part start together
    found = torch.empty(len(places), len(recall), device=model.device)
    for part in in_parts(len(places), recall, tokens_per_batch):
        rows = parts[part]
        found[rows] = restored(model, recall, clean, [places[i] for i in rows], run)
    return found


@dataclass(frozen=True)
class Traced:
    """Probabilities of the answers of N facts under one corruption, averaged over its draws."""

    clean: Tensor  # [N]
    corrupted: Tensor  # [N]
    restored: Tensor  # [n, N] of each place


def effects(traced: Traced, row: int, subjects: np.ndarray) -> dict[str, float]:
    """AIE of place `row`, its parts, and its share of what the corruption destroyed.

    aie: mean of p_restored - p_corrupted. aie_normalised: 1 - E max(0, p_clean - p_restored) / E (p_clean - p_corrupted), the paper's
    figure. Differences below `PROBABILITY_RESOLUTION` count as 0, and the share of nothing is NaN. Standard errors are over subjects
    (`subjects` [N] numbers them), as facts about the same one are not independent.
    """
    clean, corrupted, found = (x.double() for x in (traced.clean, traced.corrupted, traced.restored[row]))
    brought_back, lost, destroyed = (
        zero_below(change, PROBABILITY_RESOLUTION) for change in (found - corrupted, (clean - found).clamp(min=0), clean - corrupted)
    )
    aie, se = clustered_mean_and_se(brought_back, subjects)
    share = float(lost.mean() / destroyed.mean()) if float(destroyed.mean()) > PROBABILITY_RESOLUTION else float("nan")
    _, share_se = clustered_mean_and_se((lost - share * destroyed) / destroyed.mean(), subjects)  # delta method for a ratio of means
    means = {"p_clean": clean, "p_corrupted": corrupted, "p_restored": found}
    parts = {name: float(values.mean()) for name, values in means.items()}
    return {"aie": aie, "se": se, **parts, "n": len(clean), "aie_normalised": 1 - share, "se_normalised": share_se}


def aie_table(
    corruption: str,
    traced: Traced,
    places: Sequence[Place],
    subjects: np.ndarray,
    settings: Sequence[tuple[Site, Position, int]],
    n_layers: int,
) -> pd.DataFrame:
    """One row per setting (site, position, window) and layer, from the probabilities of the places that they mean."""
    row_of = {item: row for row, item in enumerate(places)}
    rows = []
    for site, position, width in settings:
        for layer in range(n_layers):
            row = row_of[place(site, position, layer, width, n_layers)]
            about = {"corruption": corruption, "site": site, "position": position, "window": width, "layer": layer}
            rows.append(about | effects(traced, row, subjects))
    return pd.DataFrame(rows)
