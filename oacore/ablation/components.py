"""Components of a model: heads, MLPs and whole attention layers, and what each computes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from oacore.config.ablation import ComponentKind
from oacore.engine.clean import Clean
from oacore.models.weights import Model


@dataclass(frozen=True, order=True)
class Component:
    """A head `a3.h1`, an MLP `m3` or a whole attention layer `a3`."""

    layer: int
    kind: ComponentKind
    head: int = -1

    @property
    def name(self) -> str:
        """As tables and the graph call it."""
        return {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}", "attention_layer": f"a{self.layer}"}[
            self.kind
        ]

    @classmethod
    def parse(cls, name: str) -> "Component":
        """The component of a name. ValueError for another text."""
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
        """The components, in the order of the rows."""
        return tuple(Component(self.layer, self.kind, head) for head in self.heads or (-1,))

    def __len__(self) -> int:
        return len(self.heads or (-1,))

    def chunks(self, size: int) -> "Iterator[Group]":
        """The group in parts of at most so many components."""
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
    components: list[Component] = []
    for layer in range(model.n_layers):
        for kind in ("head", "attention_layer", "mlp"):
            if kind in kinds:
                heads = range(model.n_heads) if kind == "head" else (-1,)
                components += [Component(layer, kind, head) for head in heads]
    return components


def group_components(components: Sequence[Component]) -> list[Group]:
    """Consecutive components of one layer and kind, as groups."""
    return [
        Group(layer, kind, tuple(item.head for item in items) if kind == "head" else ())
        for (layer, kind), items in groupby(components, key=lambda item: (item.layer, item.kind))
    ]


def value_of(clean: Clean, group: Group) -> Tensor:
    """What the group's components compute in a clean run: [n, B, T, w]."""
    if group.kind == "head":
        # Not by a list as index: that is copied to a GPU, and the host would wait for it.
        return torch.stack([clean.z[group.layer][:, :, head] for head in group.heads])
    if group.kind == "attention_layer":
        return clean.z[group.layer].flatten(2)[None]
    return clean.mlp[group.layer][None]


def rows_in(table: dict[str, Tensor], group: Group) -> Tensor:
    """The group's rows of a table of `Statistics`: [n, w], or [n, P + 1, w] of a positional one."""
    if group.kind == "mlp":
        return table["mlp"][group.layer][None]
    rows = table["head"][group.layer]  # [H, ..., k]
    if group.kind == "head":
        return torch.stack([rows[head] for head in group.heads])
    return rows.movedim(0, -2).flatten(-2)[None]  # [1, ..., H k]
