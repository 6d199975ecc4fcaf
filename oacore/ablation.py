"""Single-component ablation: what replaces a component's output, and the model's prediction with it replaced.

A component's *value* is what it computes: z (width k) for a head, before W_O, so that zero, means and constants live where the head
writes; what an MLP adds to the residual (width d); all of z (width H k) for a whole attention layer. Position 0 (BOS) is never ablated.

Everything below the ablated layer is the clean run, shared by all components of a batch; only the blocks above run once per component
(Li & Janson 2024, sections 2 and A; methods in the paper's order in `Method`).

Symbols: n components of one group, B prompts, T tokens, w component width, P shortest prompt.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from oacore.config import ComponentKind
from oacore.forward import add_attention, at, attention_write, combine_heads, embed, heads, last_residual_from, logits_of, mlp
from oacore.model import Model


@dataclass(frozen=True, order=True)
class Component:
    """A head `a3.h1`, an MLP `m3` or a whole attention layer `a3`."""

    layer: int
    kind: ComponentKind
    head: int = -1

    @property
    def name(self) -> str:
        return {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}", "attention_layer": f"a{self.layer}"}[self.kind]

    @classmethod
    def parse(cls, name: str) -> "Component":
        match = re.fullmatch(r"(?:a(\d+)\.h(\d+))|m(\d+)|a(\d+)", name)
        if match is None:
            raise ValueError(f"component {name!r}; allowed: a3.h1, m3 or a3")
        layer, head, mlp_layer, attention_layer = match.groups()
        if layer is not None:
            return cls(int(layer), "head", int(head))
        return cls(int(mlp_layer), "mlp") if mlp_layer is not None else cls(int(attention_layer), "attention_layer")


@dataclass(frozen=True)
class Group:
    """Components of one layer and kind, ablated side by side as rows of one batch."""

    layer: int
    kind: ComponentKind
    heads: tuple[int, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(Component(self.layer, self.kind, head) for head in self.heads or (-1,))

    def __len__(self) -> int:
        return len(self.heads or (-1,))

    def chunks(self, size: int) -> "Iterator[Group]":
        if self.kind != "head":
            yield self
            return
        for start in range(0, len(self.heads), size):
            yield Group(self.layer, self.kind, self.heads[start : start + size])


def width(model: Model, kind: ComponentKind) -> int:
    """Width w of a component's value."""
    return {"head": model.d_head, "mlp": model.d_model, "attention_layer": model.n_heads * model.d_head}[kind]


def components_of(model: Model, kinds: Sequence[ComponentKind]) -> list[Component]:
    """All components of the kinds, by layer; within a layer in the order heads, attention layer, MLP."""
    found: list[Component] = []
    for layer in range(model.n_layers):
        for kind in ("head", "attention_layer", "mlp"):
            if kind in kinds:
                found += [Component(layer, kind, head) for head in (range(model.n_heads) if kind == "head" else (-1,))]
    return found


def group_components(components: Sequence[Component]) -> list[Group]:
    """Consecutive components of one layer and kind, as groups."""
    return [
        Group(layer, kind, tuple(item.head for item in items) if kind == "head" else ())
        for (layer, kind), items in groupby(components, key=lambda item: (item.layer, item.kind))
    ]


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts on the model's device."""

    tokens: Tensor  # [N, T]
    lengths: Tensor  # [N]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Tensor | slice) -> "Batch":
        lengths = self.lengths[rows]
        return Batch(self.tokens[rows][:, : int(lengths.max())], lengths)

    def split(self, tokens_per_batch: int) -> "Iterator[Batch]":
        size = max(1, tokens_per_batch // self.tokens.shape[1])
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


@dataclass(frozen=True)
class Clean:
    """One clean pass over a batch: all that ablations of any component need of the layers below it."""

    last: Tensor  # [B] last real position
    entering: tuple[Tensor, ...]  # per layer and one after all: residual [B, T, d]
    z: tuple[Tensor, ...]  # per layer [B, T, H, k]
    combined: tuple[Tensor, ...]  # per layer [B, T, d]: heads summed after W_O, with b_O, before any post-norm
    mlp: tuple[Tensor, ...]  # per layer [B, T, d]

    def value(self, group: Group) -> Tensor:
        """What the group's components compute: [n, B, T, w]."""
        if group.kind == "head":
            return self.z[group.layer][:, :, list(group.heads)].permute(2, 0, 1, 3)
        if group.kind == "attention_layer":
            return self.z[group.layer].flatten(2)[None]
        return self.mlp[group.layer][None]


@torch.no_grad()
def clean_pass(model: Model, tokens: Tensor, lengths: Tensor) -> Clean:
    """Run the model on right-padded tokens [B, T] with lengths [B]."""
    residual = embed(model, tokens)
    entering, z, combined, mlps = [residual], [], [], []
    for layer in range(model.n_layers):
        z.append(heads(model, layer, residual))
        combined.append(combine_heads(model, layer, z[-1]))
        middle = residual + attention_write(model, layer, combined[-1])
        mlps.append(mlp(model, layer, residual if model.parallel else middle))
        residual = middle + mlps[-1]
        entering.append(residual)
    return Clean(lengths - 1, tuple(entering), tuple(z), tuple(combined), tuple(mlps))


def clean_log_probs(model: Model, clean: Clean) -> Tensor:
    """The clean next-token log-probabilities at the last position: [B, V], fp32."""
    return logits_of(model, at(clean.entering[-1], clean.last)[:, 0]).log_softmax(-1)


def ablated_logits(model: Model, clean: Clean, group: Group, replacement: Tensor) -> Tensor:
    """Logits at the last position with each component of the group replaced, one at a time.

    Args:
        replacement: [n, B or 1, T or 1, w]; position 0 keeps the clean value.

    Returns:
        [n, B, V] in fp32, differentiable in `replacement`.
    """
    n, layer, final = len(group), group.layer, group.layer == model.n_layers - 1
    value = clean.value(group)  # [n, B, T, w]
    n_tokens = value.shape[2]
    ablated_positions = (torch.arange(n_tokens, device=value.device) > 0)[:, None]  # [T, 1]
    delta = (replacement.to(value.dtype) - value) * ablated_positions  # [n, B, T, w]

    def pick(x: Tensor) -> Tensor:
        """In the last block nothing but the last position reaches the logits: [B, T, .] -> [B, 1, .]."""
        return at(x, clean.last) if final else x

    if final:
        delta = at(delta.transpose(0, 1).transpose(1, 2), clean.last).permute(2, 0, 1, 3)  # [n, B, 1, w]
    if group.kind == "mlp":
        residual = pick(clean.entering[layer + 1]) + delta
    else:
        W_O = model.blocks[layer].W_O
        weight = W_O[list(group.heads)] if group.kind == "head" else W_O.flatten(0, 1)[None]  # [n, w, d]
        combined = pick(clean.combined[layer]) + (delta.flatten(1, 2) @ weight).unflatten(1, delta.shape[1:3])  # [n, B, T, d]
        residual = add_attention(model, layer, pick(clean.entering[layer]), combined)  # [n, B, T, d]
    if not final:
        rows = residual.flatten(0, 1)  # [n B, T, d]
        return logits_of(model, last_residual_from(model, layer + 1, rows, clean.last.repeat(n))).unflatten(0, (n, -1))
    return logits_of(model, residual[:, :, 0])


@dataclass(frozen=True)
class Statistics:
    """Moments of every component's value over the training prompts, BOS excluded.

    Pooled ones run over positions >= min(9, P - 1), where values have settled and every prompt still has a token. Positional
    tables have P + 1 rows: one per position that all prompts share, and the pool of all later ones (methods.md, section 2).
    """

    shortest: int  # P
    mean: dict[str, Tensor]  # head [L, H, k], mlp [L, d]
    std: dict[str, Tensor]
    mean_positional: dict[str, Tensor]  # head [L, H, P + 1, k], mlp [L, P + 1, d]
    cf_mean: dict[str, Tensor]  # the same over counterfactual prompts

    def of(self, table: dict[str, Tensor], group: Group) -> Tensor:
        """The group's rows of a table: [n, w], or [n, P + 1, w] of a positional one."""
        if group.kind == "mlp":
            return table["mlp"][group.layer][None]
        rows = table["head"][group.layer]  # [H, ..., k]
        if group.kind == "head":
            return rows[list(group.heads)]
        return rows.movedim(0, -2).flatten(-2)[None]  # [1, ..., H k]


def first_pooled(shortest: int) -> int:
    """The first position of pooled statistics: 9, or the last that every prompt has, never BOS."""
    return max(1, min(9, shortest - 1))


def spread(table: Tensor, n_tokens: int) -> Tensor:
    """A positional table [n, P + 1, w] as a replacement [n, 1, T, w]: later positions share its last row."""
    rows = torch.arange(n_tokens, device=table.device).clamp(max=table.shape[1] - 1)
    return table[:, rows][:, None]


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of n >= 2 without fixed points (Sattolo: one random cycle)."""
    order = torch.randperm(n, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner
