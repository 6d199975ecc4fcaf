"""A model's sizes from its config.json, without loading it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from oacore.config.base import nearest
from oacore.config.model import description_of, is_directory_name
from oacore.config.run import Config
from oacore.errors import UserError
from oacore.estimate.families import FAMILIES
from oacore.models.architecture import demo_architecture
from oacore.models.graph import Graph

FP32, FP64 = 4, 8  # bytes of a number


@dataclass(frozen=True)
class Sizes:
    """What a model's config.json says of its shape.

    Args:
        n_positions: learned positions; 0 of rotary models.
        rms: its norms are RMSNorm, else LayerNorm.
        number_bytes: of one number of its weights and activations.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_positions: int
    gated: bool
    tied: bool
    parallel: bool
    rms: bool
    number_bytes: int = FP32

    @classmethod
    def of(cls, model_config: dict[str, Any], number_bytes: int = FP32) -> "Sizes":
        """From a Hugging Face config.json.

        Raises:
            UserError: it is of a family that is not in `FAMILIES`, or it lacks a size.
        """
        family = model_config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"model: its config.json has the architecture {family!r}, so its memory can't be estimated; "
                f"allowed: {', '.join(FAMILIES)}{nearest(str(family), FAMILIES)}"
            )
        try:
            return cls(**FAMILIES[family](model_config), number_bytes=number_bytes)
        except KeyError as error:
            raise UserError(f"model: its config.json has no {error}, so its memory can't be estimated") from None

    @cached_property
    def graph(self) -> Graph:
        """The residual graph: its sources S, destinations J and edges E."""
        return Graph(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel)

    @property
    def z(self) -> int:
        """Width H k of all heads together."""
        return self.n_heads * self.d_head

    @property
    def kv(self) -> int:
        """Width G k of all keys, or values, together."""
        return self.n_kv_heads * self.d_head

    @property
    def hidden(self) -> int:
        """Weights d f that read the residual into the MLP, per unit of d: f, or 2 f with a gate."""
        return self.d_mlp * (2 if self.gated else 1)

    @property
    def block_weights(self) -> int:
        """d (2 H k + 2 G k) of attention and d (f + f or 2 f) of the MLP."""
        return self.d_model * (2 * self.z + 2 * self.kv + self.d_mlp + self.hidden)

    @property
    def n_weights(self) -> int:
        """L blocks, V d of the embedding and, untied, of the unembedding, positions; without biases and norms."""
        return self.n_layers * self.block_weights + self.d_model * (
            self.d_vocab * (1 if self.tied else 2) + self.n_positions
        )

    @property
    def weights_bytes(self) -> float:
        """b a weight."""
        return self.number_bytes * self.n_weights


def known_sizes(config: Config, model_config: Path | None = None) -> Sizes | None:
    """The model's sizes from what lies on this machine, without the network; None where nothing does.

    Args:
        model_config: a config.json to take them from, instead of the model's.

    Raises:
        UserError: config.json is unreadable, of an unknown family, or lacks a size.
    """
    path = model_config
    if path is None and config.is_demo:
        return Sizes.of({"model_type": "gpt2", **demo_architecture(config.demo_model)}, number_bytes(config))
    if path is None and is_directory_name(config.model):
        path = description_of(Path(config.model).expanduser())
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: can't be read; allowed: a model's config.json") from None
    return Sizes.of(content, number_bytes(config))


def number_bytes(config: Config) -> int:
    """Bytes of one number of weights and activations."""
    return 2 if config.dtype == "bf16" else FP32
