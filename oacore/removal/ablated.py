"""What an ablation is, once it is chosen: how the model answers under it, and its tensors.

Components and directions are ablated at every position, the first (BOS) included, since the weights themselves are
edited and have no way to tell it apart; edges, which need the masked pass, at every position but BOS.

Symbols: B prompts, T tokens, V vocabulary, L layers, H heads, k head width, d model width, r directions.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from oacore.circuits.constants import Constants
from oacore.engine.clean import Batch
from oacore.engine.edge_pass import logits_without_edges
from oacore.engine.forward import embed, last_residual_from, logits_of, run_block
from oacore.engine.masked import Engine
from oacore.models.weights import Model

Tensors = dict[str, Tensor]


class Ablated(Protocol):
    """An ablation, which stays what it is whatever the weights become."""

    @property
    def size(self) -> int:
        """How many edges, components or directions it ablates."""

    def logits(self, engine: Engine, model: Model, batch: Batch) -> Tensor:
        """Logits [B, V] at each prompt's last position, differentiable in the weights of another model than the
        engine's.

        Args:
            model: the engine's, or one fine-tuned from it.
        """

    def streams(self, model: Model) -> int:
        """As many residual streams a prompt's tokens take in a pass of a fine-tuned model."""

    def tensors(self) -> Tensors:
        """All that it is made of, by name, on the CPU."""


@dataclass(frozen=True)
class Components:
    """Heads and MLPs whose outputs are constants. A head's is z, before W_O; an MLP's is what it adds to the stream, or
    what goes into its post-norm.
    """

    heads: Tensor  # bool [L, H]
    mlps: Tensor  # bool [L]
    head: Tensor  # [L, H, k]
    mlp: Tensor  # [L, d]

    @property
    def size(self) -> int:
        """Heads and MLPs."""
        return int(self.heads.sum()) + int(self.mlps.sum())

    def edited(self, model: Model) -> Model:
        """The model with the ablation in its weights: no W_O, or W_out, of what is ablated, and constants in biases;
        differentiable in the weights and constants.
        """
        blocks = []
        for layer, block in enumerate(model.blocks):
            changed: dict[str, Any] = {}
            if self.heads[layer].any():
                kept = ~self.heads[layer][:, None, None]  # [H, 1, 1]
                writes = torch.einsum("hk,hkd->d", self.head[layer].to(block.W_O.dtype), block.W_O * ~kept)
                changed = {"W_O": block.W_O * kept, "b_O": writes if block.b_O is None else block.b_O + writes}
            if self.mlps[layer]:
                changed |= {"W_out": block.W_out * 0, "b_out": self.mlp[layer].to(block.W_out.dtype)}
            blocks.append(replace(block, **changed))
        return replace(model, blocks=tuple(blocks))

    def logits(self, engine: Engine, model: Model, batch: Batch) -> Tensor:
        """As `Ablated`."""
        return plain_logits(self.edited(model), batch)

    def streams(self, model: Model) -> int:
        """As `Ablated`."""
        return 1

    def tensors(self) -> Tensors:
        """As `Ablated`."""
        return {field.name: getattr(self, field.name).cpu() for field in fields(self)}


@dataclass(frozen=True)
class Directions:
    """Directions of the residual stream that enters a layer (or, of layer L, the final norm), along which it is the
    same everywhere.
    """

    layer: int
    basis: Tensor  # [d, r] orthonormal
    along: Tensor  # [r] where the stream is along them

    @property
    def size(self) -> int:
        """How many directions."""
        return self.basis.shape[1]

    def logits(self, engine: Engine, model: Model, batch: Batch) -> Tensor:
        """As `Ablated`."""
        residual = embed(model, batch.tokens)
        for layer in range(self.layer):
            residual = run_block(model, layer, residual)
        basis, along = (part.to(residual.dtype) for part in (self.basis, self.along))
        residual = residual + (along - residual @ basis) @ basis.T  # [B, T, d]
        return logits_of(model, last_residual_from(model, self.layer, residual, batch.lengths - 1))

    def streams(self, model: Model) -> int:
        """As `Ablated`."""
        return 1

    def tensors(self) -> Tensors:
        """As `Ablated`."""
        return {"layer": torch.tensor(self.layer), "basis": self.basis.cpu(), "along": self.along.cpu()}


@dataclass(frozen=True)
class Edges:
    """Edges of the residual graph that carry constants of their sources."""

    kept: Tensor  # bool [J, S]
    constants: Constants  # F = 1
    n_edges: int  # of the whole graph

    @property
    def size(self) -> int:
        """How many edges are cut."""
        return self.n_edges - int(self.kept.sum())

    def logits(self, engine: Engine, model: Model, batch: Batch) -> Tensor:
        """As `Ablated`; edges carry what the engine's model wrote."""
        prompts = engine.prompts(batch)
        written = self.constants.writes(engine, prompts.n_tokens)
        if model is not engine.model:
            return logits_without_edges(model, batch, self.kept, written[0].to(model.dtype))
        rows = torch.arange(len(batch), device=model.device)
        return engine.logits(prompts, rows, self.kept.float()[None], written)

    def streams(self, model: Model) -> int:
        """As `Ablated`."""
        return model.graph.n_sources

    def tensors(self) -> Tensors:
        """As `Ablated`."""
        return {"kept": self.kept.cpu()} | {name: part.cpu() for name, part in self.constants._asdict().items()}


def plain_logits(model: Model, batch: Batch) -> Tensor:
    """Logits [B, V] of the model at each prompt's last position."""
    return logits_of(model, last_residual_from(model, 0, embed(model, batch.tokens), batch.lengths - 1))
