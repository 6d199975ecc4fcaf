"""A decoder as canonical weights, the same for every family."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from oacore.config.model import REGISTERED
from oacore.models.graph import Graph

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where `rms`, over the last dimensions of what has the weight's shape there. Gemma's "1 +
    weight" is already added.
    """

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float
    rms: bool


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: an angle is a position times a frequency."""

    frequencies: Tensor  # [r / 2] fp32
    long_frequencies: Tensor | None  # of prompts of more than `short_length` tokens (longrope)
    short_length: int
    scale: float  # of cos and sin

    @torch.no_grad()
    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, r], in x's dtype, at positions [1, T] that count from 0."""
        long = self.long_frequencies is not None and positions.shape[1] > self.short_length
        frequencies = self.long_frequencies if long else self.frequencies
        assert frequencies is not None
        angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)
        return (angles.cos() * self.scale).to(x.dtype), (angles.sin() * self.scale).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block. Absent parts are None; KV = H unless the model groups queries."""

    attention_norm: Norm | None = None  # before attention; OLMo-2 has none, here and before the MLP
    mlp_norm: Norm | None = None
    attention_post_norm: Norm | None = None  # RMSNorm (Gemma-2 and 3, OLMo-2)
    mlp_post_norm: Norm | None = None
    W_Q: Tensor  # [d, H, k]
    W_K: Tensor  # [d, KV, k]
    W_V: Tensor  # [d, KV, k]
    W_O: Tensor  # [H, k, d]
    b_Q: Tensor | None = None  # [H, k]; of Q, K and V all have biases, or none
    b_K: Tensor | None = None  # [KV, k]
    b_V: Tensor | None = None  # [KV, k]
    b_O: Tensor | None = None  # [d]
    attention_scale: float  # of the scores: usually k^-1/2
    attention_softcap: float | None = None
    window: int | None = None  # a query sees this many positions, its own included
    W_in: Tensor  # [d, f]
    W_gate: Tensor | None = None  # [d, f]
    W_out: Tensor  # [f, d]
    b_in: Tensor | None = None  # [f]
    b_out: Tensor | None = None  # [d]
    query_norm: Norm | None = None  # of each head's query, weight [k] (Qwen-3, Gemma-3), or of all, [H, k] (OLMo-2)
    key_norm: Norm | None = None  # of keys, likewise [k] or [KV, k]
    rotary: Rotary | None = None  # in place of the model's (Gemma-3's layers with a window)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Canonical weights of a decoder, on one device, without gradients. Absent parts are None."""

    family: str = REGISTERED
    parallel: bool = False  # attention and MLP of a block read the same residual
    W_E: Tensor  # [V, d]
    W_pos: Tensor | None = None  # [P, d] learned positions
    embed_scale: float = 1.0  # Gemma multiplies embeddings by sqrt(d)
    rotary: Rotary | None = None
    activation: str  # of `ACTIVATIONS`
    blocks: tuple[Block, ...]
    final_norm: Norm | None = None
    W_U: Tensor  # [V, d], as stored: tied to W_E in most small models
    b_U: Tensor | None = None  # [V]
    logit_softcap: float | None = None
    max_length: int  # tokens of a prompt, BOS included

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """H, query heads of a layer."""
        return self.blocks[0].W_Q.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads of a layer; fewer than H where queries are grouped."""
        return self.blocks[0].W_K.shape[1]

    @property
    def d_head(self) -> int:
        """k, the width of a head."""
        return self.blocks[0].W_Q.shape[2]

    @property
    def d_model(self) -> int:
        """d, the width of the residual stream."""
        return self.W_E.shape[1]

    @property
    def d_vocab(self) -> int:
        """V, the size of the vocabulary."""
        return self.W_U.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_E.dtype

    @property
    def post_norm(self) -> bool:
        """Whether what a block's attention and MLP add is normalised (Gemma-2 and 3, OLMo-2)."""
        return self.blocks[0].attention_post_norm is not None

    @property
    def centred(self) -> bool:
        """Whether whatever reads the residual stream removes its mean over d first, as LayerNorm does.

        Raises:
            ValueError: some of it does, and some does not.
        """
        norms = [self.final_norm, *(norm for block in self.blocks for norm in (block.attention_norm, block.mlp_norm))]
        centring = {norm is not None and not norm.rms for norm in norms}
        if len(centring) > 1:
            raise ValueError("LayerNorm before some of what reads the residual stream; allowed: before all, or none")
        return centring.pop()

    @property
    def heads_apart(self) -> bool:
        """Whether a layer's heads meet in no norm, so that what one computes does not depend on the others."""
        return not self.post_norm and all(
            norm is None or norm.weight.dim() == 1
            for block in self.blocks
            for norm in (block.query_norm, block.key_norm)
        )

    @cached_property
    def graph(self) -> Graph:
        """The residual-stream graph."""
        return Graph(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass tree with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)}
        )
    return value


def to_device(model: Model, device: torch.device | str) -> Model:
    """The same model on another device; tied weights stay tied."""
    moved: dict[object, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        same = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        return moved.setdefault(same, tensor.to(device)) if same not in moved else moved[same]

    result: Model = _map_tensors(model, move)
    return result


def named_tensors(model: Model) -> dict[str, Tensor]:
    """Every weight by its path, e.g. `blocks.3.W_Q`."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}")
        elif is_dataclass(value):
            for field in fields(value):
                walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)

    walk(model, "")
    return tensors


def weight_hash(model: Model) -> str:
    """sha256 over names, shapes, dtypes and bytes of all weights, and all else that decides outputs: every artefact's
    `model_hash`.
    """
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    scalars = (
        model.family,
        model.parallel,
        model.embed_scale,
        model.activation,
        model.logit_softcap,
        _eps(model.final_norm),
    )
    per_block = [
        (
            *(block.attention_scale, block.attention_softcap, block.window),
            *(_eps(block.attention_norm), _eps(block.mlp_norm)),
            *(norm.eps for norm in (block.query_norm, block.key_norm) if norm is not None),
        )
        for block in model.blocks
    ]
    rotaries = [
        (rotary.short_length, rotary.scale)
        for rotary in (model.rotary, *(block.rotary for block in model.blocks))
        if rotary is not None
    ]
    digest.update(json.dumps([scalars, per_block, rotaries], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _eps(norm: Norm | None) -> float | None:
    return None if norm is None else norm.eps
