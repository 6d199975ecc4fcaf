"""What a masked pass holds of its rows: prompts, which replacement each row takes, and what its sources wrote.

A buffer has every ablatable position of a row, or the last one alone: of the last block, only keys and values are
needed at more positions. Both kinds answer the same questions, and a pass asks the one that it works on.

Symbols: B rows, F fits, P prompts, U different first tokens, T tokens, t = T - 1 of them after BOS, S sources,
KV key/value heads, k head width, r rotary width, d model width, Q = 1 or t positions of a replacement, q = t or 1
positions of a buffer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedPrompts:
    """What masked passes need of their prompts; made once by `Engine.prompts`, used for any number of passes."""

    input: Tensor  # [P, t, d] embeddings after BOS, centred for LayerNorm
    bos: tuple[tuple[Tensor, Tensor], ...]  # per layer clean keys (rotated) and values of every first token [U, KV, k]
    first: Tensor  # [P] which of the U first tokens a prompt has; nearly always the same one
    last: Tensor  # [P] the last token's place among t
    rotary: tuple[tuple[Tensor, Tensor] | None, ...]  # per layer cos, sin [t, r]

    def __len__(self) -> int:
        return len(self.input)

    @property
    def n_tokens(self) -> int:
        """t, the ablatable positions."""
        return self.input.shape[1]


@dataclass(frozen=True)
class Rows:
    """What the B rows of a pass are made of."""

    prompts: MaskedPrompts
    prompt: Tensor  # [B] which of the P prompts
    owner: Tensor  # [B] which of the F replacements, constants of a fit or activations of a prompt
    in_runs: bool  # B / F consecutive rows take the same replacement, which a mix then shares without copies

    @classmethod
    def of(cls, prompts: MaskedPrompts, prompt: Tensor, owner: Tensor | None, n_replacements: int) -> "Rows":
        """Rows whose replacements belong to `owner` [B], or by default to equal runs of rows."""
        number = torch.arange(len(prompt), device=prompt.device)
        return cls(
            prompts, prompt, number // (len(prompt) // n_replacements) if owner is None else owner, owner is None
        )

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def number(self) -> Tensor:
        """0, 1, ... B - 1."""
        return torch.arange(len(self), device=self.prompt.device)

    @cached_property
    def last(self) -> Tensor:
        """The last token's place among t: [B]."""
        return self.prompts.last[self.prompt]

    @cached_property
    def first(self) -> Tensor:
        """Which of the U first tokens: [B]."""
        return self.prompts.first[self.prompt]


class Buffer(ABC):
    """The sources of a pass at some positions of each row: what they write minus what replaces it, and its gradient."""

    def __init__(self, rows: Rows, n_sources: int, n_positions: int, like: Tensor):
        """Memory for [S, B, q, d] of the dtype and width of `like` [..., d], not filled."""
        self.rows = rows
        self.delta = like.new_empty((n_sources, len(rows), n_positions, like.shape[-1]))
        self.opened, self.d_delta = slice(0, 0), self.delta[:0]
        self._hidden: dict[int | None, Tensor] = {}

    def open(self, sources: slice) -> Tensor:
        """Memory for the gradient of a run of sources [n, B, q, d], not filled, in place of what was open before."""
        self.opened, self.d_delta = sources, torch.empty_like(self.delta[sources])
        return self.d_delta

    def gradient(self, sources: slice) -> Tensor:
        """What readers have added to the gradient of sources that are open [n, B, q, d], to be added to in place."""
        return self.d_delta[sources.start - self.opened.start : sources.stop - self.opened.start]

    def base(self, base: Tensor) -> Tensor:
        """A base [F, Q, d] as a mix takes it: [F, 1 or q, d] if rows come in runs, else [B, 1 or q, d]."""
        return base if self.rows.in_runs else base[self.rows.owner]

    def of_rows(self, values: Tensor) -> Tensor:
        """The replacements [F, n, Q, d] of n sources, for each row: [n, B or 1, 1 or q, d]."""
        return (values if len(values) == 1 else values[self.rows.owner]).transpose(0, 1)

    def hidden(self, window: int | None) -> Tensor:
        """Which of T keys, BOS counted, queries of a layer with this window do not see: bool [q, T] or [B, 1, T]; made
        once for all layers.
        """
        if window not in self._hidden:
            key, query = torch.arange(self.rows.prompts.n_tokens + 1, device=self.delta.device), self.query
            seen = key <= query
            self._hidden[window] = ~(seen if window is None else seen & (key > query - window))
        return self._hidden[window]

    @property
    @abstractmethod
    def query(self) -> Tensor:
        """Where in the prompt, BOS counted, the positions are, to be held against keys [T]: [q, 1] or [B, 1, 1]."""

    @abstractmethod
    def at_queries(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin [t, r] at the buffer's positions: [q, r] or [B, 1, r]."""

    @abstractmethod
    def restricted(self, values: Tensor) -> Tensor:
        """Values at every position [n, B, t, d], at the buffer's: [n, B, q, d]."""

    @abstractmethod
    def extended(self, values: Tensor) -> Tensor:
        """Values [n, B, q, d] at every position, 0 where the buffer has none: [n, B, t, d]."""


class EveryPosition(Buffer):
    """Sources before the last block, at all t positions."""

    def __init__(self, rows: Rows, n_sources: int, like: Tensor):
        super().__init__(rows, n_sources, rows.prompts.n_tokens, like)

    @property
    def query(self) -> Tensor:
        """1 to t, [t, 1]."""
        return torch.arange(1, self.rows.prompts.n_tokens + 1, device=self.rows.prompt.device)[:, None]

    def at_queries(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin as they are."""
        return rotary

    def restricted(self, values: Tensor) -> Tensor:
        """The values as they are."""
        return values

    def extended(self, values: Tensor) -> Tensor:
        """The values as they are."""
        return values


class LastPosition(Buffer):
    """All sources, at each row's last position alone."""

    def __init__(self, rows: Rows, n_sources: int, like: Tensor):
        super().__init__(rows, n_sources, 1, like)

    def base(self, base: Tensor) -> Tensor:
        """Each row's at its last position, if the base has positions."""
        return super().base(base) if base.shape[1] == 1 else base[self.rows.owner, self.rows.last][:, None]

    def of_rows(self, values: Tensor) -> Tensor:
        """Each row's at its last position, if the values have positions."""
        if values.shape[2] == 1:
            return super().of_rows(values)
        return values[self.rows.owner, :, self.rows.last].transpose(0, 1)[:, :, None]

    @property
    def query(self) -> Tensor:
        """Each row's last, [B, 1, 1]."""
        return self.rows.last[:, None, None] + 1

    def at_queries(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """At each row's last, [B, 1, r]."""
        cos, sin = rotary
        return cos[self.rows.last][:, None], sin[self.rows.last][:, None]

    def restricted(self, values: Tensor) -> Tensor:
        """At each row's last, [n, B, 1, d]."""
        return values[:, self.rows.number, self.rows.last][:, :, None]

    def extended(self, values: Tensor) -> Tensor:
        """0 but at the last, [n, B, t, d]."""
        n, B, _, d = values.shape
        everywhere = values.new_zeros((n, B, self.rows.prompts.n_tokens, d))
        everywhere[:, self.rows.number, self.rows.last] = values[:, :, 0]
        return everywhere

    def take_over(self, every: EveryPosition) -> None:
        """Copy what the first sources wrote at the last position."""
        self.delta[: len(every.delta)] = self.restricted(every.delta)

    def hand_back(self, every: EveryPosition) -> None:
        """Add the gradient of the sources that are open there where their values came from."""
        every.d_delta[:, self.rows.number, self.rows.last] += self.gradient(every.opened)[:, :, 0]
