"""Facts that the model completes, and the probability of their answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oacore.config.tracing import AnswerKind, Position
from oacore.engine.clean import clean_pass, taken
from oacore.engine.forward import add_positions, embed_tokens, logits_of
from oacore.models.weights import Model
from oacore.tasks.prompts import Prompts


@dataclass(frozen=True)
class Recall:
    """Facts that the model completes: right-padded prompts, each followed by its answer's tokens but the last."""

    tokens: Tensor  # [B, T]
    lengths: Tensor  # [B]
    last: Tensor  # [B] position of the prompt's last token, where the answer's first token is predicted
    subject: Tensor  # [B, 2] half-open span of positions
    answer: Tensor  # [B, M], padded with -1
    other: Tensor  # [B, T] the same about another subject of the same length; the corrupt prompt of a pair
    numbers: Tensor  # [B] of each fact in its split, whatever the batch: the seed of its own random numbers
    cluster: Tensor  # [B], the same number for facts that are not independent, such as those about one subject

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def host_lengths(self) -> NDArray[np.int64]:
        """[B], as `Batch.host_lengths`."""
        lengths: NDArray[np.int64] = self.lengths.cpu().numpy()
        return lengths

    def take(self, rows: Tensor | slice) -> "Recall":
        """Some of the facts, as wide as the longest of them; `rows` as `Batch.take` has them."""
        index, host_lengths = taken(rows, self.lengths.device, self.host_lengths)
        tokens, other = (part[index][:, : host_lengths.max()] for part in (self.tokens, self.other))
        lengths, last, subject, answer, numbers, cluster = (
            part[index] for part in (self.lengths, self.last, self.subject, self.answer, self.numbers, self.cluster)
        )
        recall = Recall(tokens, lengths, last, subject, answer, other, numbers, cluster)
        recall.__dict__["host_lengths"] = host_lengths
        return recall

    def split(self, tokens_per_batch: int) -> "Iterator[Recall]":
        """All facts in order, in batches of about so many tokens."""
        size = max(1, tokens_per_batch // self.tokens.shape[1])
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def in_batches(self, tokens_per_batch: int) -> "Iterator[Recall]":
        """All facts in order, so few at a time that some places of each can run side by side."""
        return self.split(tokens_per_batch // 4)

    @property
    def in_subject(self) -> Tensor:
        """[B, T] bool."""
        return self.at_positions("all_subject")

    @property
    def subject_numbers(self) -> np.ndarray:
        """[B] the same for facts about the same subject, by its tokens."""
        seen: dict[tuple[int, ...], int] = {}
        spans = [
            tuple(tokens[first:end])
            for tokens, (first, end) in zip(self.tokens.tolist(), self.subject.tolist(), strict=True)
        ]
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
    """A split of a task with subjects. `answer`: "first_token" of the answer, or "joint": all of them, each after
    those before it; of several right answers the first.
    """
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
    subject, numbers = torch.from_numpy(prompts.subject).long(), torch.arange(len(tokens))
    cluster = torch.from_numpy(prompts.cluster).long()
    parts = (tokens, lengths + count - 1, lengths - 1, subject, ids, other, numbers, cluster)
    return Recall(*(part.to(device) for part in parts))


def answer_probability(model: Model, recall: Recall, residual: Tensor) -> Tensor:
    """Probability of each fact's answer [..., B]: of all its tokens together.

    Args:
        residual: after all blocks, [..., B, T, d], or [..., B, 1, d] at the prompt's last position where answers have
            one token.
    """
    log_probs, _ = _answer(model, recall, residual)
    if log_probs.device.type != "cpu":
        return log_probs.exp()
    # Row by row: a CPU computes exponentials of the last numbers of a tensor in another way than those before, and
    # places that are run together would differ in the last bit from the same ones run alone.
    return torch.stack([row.exp() for row in log_probs.reshape(-1, len(recall))]).view_as(log_probs)


@torch.no_grad()
def completes(model: Model, recall: Recall, tokens_per_batch: int) -> Tensor:
    """Which facts [B] the model completes: greedy decoding gives every token of the answer."""
    right = []
    for part in recall.split(tokens_per_batch):
        clean = clean_pass(model, part.tokens, part.lengths)
        right.append(_answer(model, part, clean.entering[-1])[1])
    return torch.cat(right)


def _answer(model: Model, recall: Recall, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [..., B] of the answers, and whether each of their tokens is the most likely one [..., B]."""
    n_answers = recall.answer.shape[1]
    if residual.shape[-2] > 1 or n_answers > 1:
        reads = (recall.last[:, None] + torch.arange(n_answers, device=residual.device)).clamp(
            max=residual.shape[-2] - 1
        )  # [B, M]
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
