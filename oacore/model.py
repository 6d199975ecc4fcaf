"""Load any supported model once into canonical weights.

Weights are read from TransformerLens's TransformerBridge, whose component names are the same for every family. Scalars are read
from the Hugging Face modules under it, because the bridge's own `cfg` misreports rotary bases, windows and softcaps (4.3.0).
"""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oacore.config import ARCHITECTURES, check_architecture, is_directory_name
from oacore.errors import UserError
from oacore.graph import Graph

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable and only its local cache is used

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where `rms`. Gemma's "1 + weight" is already added."""

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float
    rms: bool


@dataclass(frozen=True)
class Block:
    """One transformer block. Absent parts are None; KV = H unless the model groups queries."""

    attention_norm: Norm
    mlp_norm: Norm
    attention_post_norm: Norm | None  # Gemma-2
    mlp_post_norm: Norm | None  # Gemma-2
    W_Q: Tensor  # [d, H, k]
    W_K: Tensor  # [d, KV, k]
    W_V: Tensor  # [d, KV, k]
    W_O: Tensor  # [H, k, d]
    b_Q: Tensor | None  # [H, k]
    b_K: Tensor | None  # [KV, k]
    b_V: Tensor | None  # [KV, k]
    b_O: Tensor | None  # [d]
    attention_scale: float
    attention_softcap: float | None
    window: int | None  # a query sees this many positions, its own included
    W_in: Tensor  # [d, f]
    W_gate: Tensor | None  # [d, f]
    W_out: Tensor  # [f, d]
    b_in: Tensor | None  # [f]
    b_out: Tensor | None  # [d]


@dataclass(frozen=True)
class Model:
    """Canonical weights of a decoder, on one device, without gradients."""

    family: str
    parallel: bool  # attention and MLP of a block read the same residual
    W_E: Tensor  # [V, d]
    W_pos: Tensor | None  # [P, d] learned positions
    embed_scale: float  # Gemma multiplies embeddings by sqrt(d)
    rotary: torch.nn.Module | None  # the model's own rotary module: (x, positions [1, T]) -> cos, sin [1, T, r]
    activation: str
    blocks: tuple[Block, ...]
    final_norm: Norm
    W_U: Tensor  # [V, d], as stored: tied to W_E in most small models
    b_U: Tensor | None  # [V]
    logit_softcap: float | None
    max_length: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        return self.blocks[0].W_Q.shape[1]

    @property
    def n_kv_heads(self) -> int:
        return self.blocks[0].W_K.shape[1]

    @property
    def d_head(self) -> int:
        return self.blocks[0].W_Q.shape[2]

    @property
    def d_model(self) -> int:
        return self.W_E.shape[1]

    @property
    def d_vocab(self) -> int:
        return self.W_U.shape[0]

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    @property
    def post_norm(self) -> bool:
        """Whether what a block's attention and MLP add is normalised once more (Gemma-2)."""
        return self.blocks[0].attention_post_norm is not None

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel)


@dataclass(frozen=True)
class Loaded:
    """A model with what it was loaded from."""

    model: Model
    tokenizer: Any  # Hugging Face fast tokenizer
    revision: str | None  # commit of a hub model
    weight_hash: str


def pick_device(device: str) -> torch.device:
    """`auto` takes a GPU when there is one.

    Raises:
        UserError: `cuda` is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda', but PyTorch sees no GPU; allowed: auto, cpu, or cuda on a machine with a GPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The fast tokenizer of a directory or hub model; imports transformers.

    Raises:
        UserError: there is none, or the hub can't be reached.
    """
    from transformers import AutoTokenizer

    with _hub_errors(source, revision):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, local_files_only=not _hub_is_needed_and_there(source), trust_remote_code=False, use_fast=True
        )


def load(source: str | Path, *, revision: str | None = None, dtype: str = "fp32", device: str = "auto") -> Loaded:
    """Load a directory or hub model into canonical weights.

    Args:
        source: a directory as written by `save_pretrained`, or a Hugging Face name.
        revision: branch, tag or commit of a hub model.
        dtype: `fp32` or `bf16`.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: no such directory or hub model, unreachable hub, unsupported architecture.
    """
    hf = load_hugging_face(source, revision=revision, dtype=dtype)
    tokenizer = load_tokenizer(source, revision)
    commit = getattr(hf.config, "_commit_hash", None)
    model = to_device(canonical(hf), pick_device(device))
    return Loaded(model, tokenizer, commit, weight_hash(model))


def load_hugging_face(source: str | Path, *, revision: str | None = None, dtype: str = "fp32") -> Any:
    """The plain Hugging Face model on the CPU in evaluation mode; never runs code from the hub.

    Raises:
        UserError: as `load`.
    """
    from transformers import AutoModelForCausalLM

    hugging_face_config(source, revision=revision)
    source = Path(source).expanduser() if is_directory_name(str(source)) else source
    with _hub_errors(source, revision):
        return AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            local_files_only=not _hub_is_needed_and_there(source),
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            attn_implementation="eager",
        ).eval()


def hugging_face_config(source: str | Path, *, revision: str | None = None) -> Any:
    """The Hugging Face config of a directory or hub model, of a supported architecture.

    Raises:
        UserError: as `load`.
    """
    from transformers import AutoConfig

    if is_directory_name(str(source)):
        if not Path(source).expanduser().is_dir():
            raise UserError(
                f"model: {str(source)!r} is not a directory; allowed: demo, a Hugging Face name, or an existing model directory"
            )
        source = Path(source).expanduser()
        check_architecture(str(source), source / "config.json")
    with _hub_errors(source, revision):
        only_local = not _hub_is_needed_and_there(source)
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=only_local, trust_remote_code=False)
        if config.model_type not in ARCHITECTURES:
            raise UserError(f"model: {str(source)!r} has the architecture {config.model_type!r}; allowed: {', '.join(ARCHITECTURES)}")
        return config


def _hub_is_needed_and_there(source: str | Path) -> bool:
    """Whether to ask the hub: not for a directory, nor when it does not answer, since the hub's own client retries for 23-46 s."""
    return not Path(source).is_dir() and _hub_answers()


@cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _hub_errors(source: str | Path, revision: str | None) -> Any:
    """Turn the many exceptions of a failed load into one sentence with the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors and hub errors alike
        where = f"model: {str(source)!r}" + (f" (revision {revision!r})" if revision else "")
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "a complete model directory" if Path(source).is_dir() else "a model on a reachable hub, in its local cache, or a directory"
        raise UserError(f"{where} can't be loaded ({type(error).__name__}: {cause}); allowed: {hint}") from error


def canonical(hf: Any) -> Model:
    """Read the weights of a Hugging Face causal LM through TransformerBridge.

    Building a bridge rewires `hf` in place: compute whatever needs the plain model first.

    Raises:
        UserError: the activation function or the positions are of a kind that `oacore.forward` does not compute.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = hf.config
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=config, tokenizer=None)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation_function
    if activation not in ACTIVATIONS:
        raise UserError(f"model: activation function {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    scale = getattr(bridge.embed.original_component, "scalar_embed_scale", 1.0)
    with torch.no_grad():
        model = Model(
            family=config.model_type,
            parallel=bool(getattr(config, "use_parallel_residual", False)),
            W_E=bridge.embed.original_component.weight,
            W_pos=bridge.pos_embed.original_component.weight if hasattr(bridge, "pos_embed") else None,
            embed_scale=float(scale),
            rotary=bridge.rotary_emb.original_component if hasattr(bridge, "rotary_emb") else None,
            activation=activation,
            blocks=tuple(_block(block) for block in bridge.blocks),
            final_norm=_norm(bridge.ln_final),
            W_U=bridge.unembed.original_component.weight,
            b_U=bridge.unembed.original_component.bias,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            max_length=config.max_position_embeddings,
        )
        return _map_tensors(model, lambda tensor: tensor.detach().contiguous())


def _block(block: Any) -> Block:
    attention, mlp, hf = block.attn, block.mlp, block.attn.original_component
    return Block(
        attention_norm=_norm(block.ln1),
        mlp_norm=_norm(block.ln2),
        attention_post_norm=_norm(block.ln1_post) if hasattr(block, "ln1_post") else None,
        mlp_post_norm=_norm(block.ln2_post) if hasattr(block, "ln2_post") else None,
        W_Q=attention.W_Q.transpose(0, 1),
        W_K=attention.W_K.transpose(0, 1),
        W_V=attention.W_V.transpose(0, 1),
        W_O=attention.W_O,
        b_Q=attention.b_Q,
        b_K=attention.b_K,
        b_V=attention.b_V,
        b_O=attention.b_O,
        attention_scale=hf.scaling,  # holds GPT-2's inverse-layer factor too
        attention_softcap=getattr(hf, "attn_logit_softcapping", None),
        window=getattr(hf, "sliding_window", None),
        W_in=mlp.W_in,
        W_gate=mlp.W_gate,
        W_out=mlp.W_out,
        b_in=mlp.b_in,
        b_out=mlp.b_out,
    )


def _norm(bridge_norm: Any) -> Norm:
    norm = bridge_norm.original_component
    if isinstance(norm, torch.nn.LayerNorm):
        return Norm(norm.weight, norm.bias, norm.eps, rms=False)
    gemma = type(norm).__name__.startswith("Gemma")
    return Norm(1 + norm.weight.float() if gemma else norm.weight, None, norm.eps if gemma else norm.variance_epsilon, rms=True)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass tree with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _map_tensors(getattr(value, field.name), change) for field in fields(value)})
    return value


def to_device(model: Model, device: torch.device | str) -> Model:
    """The same model on another device."""
    moved: Model = _map_tensors(model, lambda tensor: tensor.to(device))
    if moved.rotary is not None:
        moved.rotary.to(device)
    return moved


def named_tensors(model: Model) -> dict[str, Tensor]:
    """Every weight by its path, e.g. `blocks.3.W_Q`."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}")
        elif is_dataclass(value):
            for field in fields(value):
                walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)

    walk(model, "")
    return found


def weight_hash(model: Model) -> str:
    """sha256 over names, shapes, dtypes and bytes of all weights, and all else that decides outputs: every artefact's `model_hash`."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    scalars = (model.family, model.parallel, model.embed_scale, model.activation, model.logit_softcap, model.final_norm.eps)
    per_block = [
        (block.attention_scale, block.attention_softcap, block.window, block.attention_norm.eps, block.mlp_norm.eps)
        for block in model.blocks
    ]
    rotary = getattr(getattr(model.rotary, "config", None), "rope_parameters", None)
    digest.update(json.dumps([scalars, per_block, rotary], sort_keys=True, default=str).encode())
    return digest.hexdigest()
