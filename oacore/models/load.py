"""Load any supported model once into canonical weights.

Weights are read from TransformerLens's TransformerBridge, whose component names are the same for every family. Scalars
are read from the Hugging Face modules under it, because the bridge's own `cfg` misreports rotary bases, windows and
softcaps (4.3.0).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oacore.errors import UserError
from oacore.models.hub import load_hugging_face, load_tokenizer
from oacore.models.registered import is_registered, read_registered
from oacore.models.weights import ACTIVATIONS, Block, Model, Norm, Rotary, _map_tensors, to_device, weight_hash

GLOBAL = "full_attention"  # layers that take the model's rotary positions, as Hugging Face calls them


@dataclass(frozen=True)
class Loaded:
    """A model with what it was loaded from."""

    model: Model
    source: str | Path
    revision: str | None  # commit of a hub model
    weight_hash: str

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face fast tokenizer; imports transformers, which takes seconds.

        Raises:
            UserError: as `load_tokenizer`.
        """
        return load_tokenizer(self.source, self.revision)


def pick_device(device: str) -> torch.device:
    """`auto` takes a GPU when there is one.

    Raises:
        UserError: `cuda` is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda', but PyTorch sees no GPU; allowed: auto, cpu, or cuda on a machine with a GPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> Literal["ieee", "tf32"]:
    """Of products of fp32 numbers: `auto` is TF32 on a GPU; a CPU has IEEE's alone."""
    return "ieee" if precision == "ieee" or device.type == "cpu" else "tf32"


def set_precision(precision: str, device: torch.device) -> None:
    """Let all products of this process round like that; on a CPU it would be oneDNN's choice, and is left alone."""
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest" if pick_precision(precision, device) == "ieee" else "high")


def load(source: str | Path, *, revision: str | None = None, dtype: str = "fp32", device: str = "auto") -> Loaded:
    """Load a directory or hub model into canonical weights.

    Args:
        source: a directory as written by `save_pretrained` or `oacore.register`, or a Hugging Face name.
        revision: branch, tag or commit of a hub model.
        dtype: `fp32` or `bf16`.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: no such directory or hub model, unreachable hub, unsupported architecture.
    """
    if is_registered(source):
        model, commit = read_registered(source, dtype), None
    else:
        hf = load_hugging_face(source, revision=revision, dtype=dtype)
        model, commit = canonical(hf), getattr(hf.config, "_commit_hash", None)
    model = to_device(model, pick_device(device))
    return Loaded(model, source, commit or revision, weight_hash(model))


def canonical(hf: Any) -> Model:
    """Read the weights of a Hugging Face causal LM through TransformerBridge.

    Building a bridge rewires `hf` in place: compute whatever needs the plain model first.

    Raises:
        UserError: the activation function, the positions or a part of a block are of a kind that
            `oacore.engine.forward` does not compute.
    """
    try:
        return _canonical(hf)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"model: a {hf.config.model_type} of another form than is read here ({error or 'TransformerBridge'}); "
            "allowed: the form that its family usually has"
        ) from error


def _canonical(hf: Any) -> Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = hf.config
    _fill_up_biases(hf)
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=config, tokenizer=None)
    activation = (
        getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation_function
    )
    if activation not in ACTIVATIONS:
        raise UserError(f"model: activation function {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    rotaries = _rotaries(bridge.rotary_emb.original_component) if hasattr(bridge, "rotary_emb") else {}
    scale = getattr(bridge.embed.original_component, "scalar_embed_scale", 1.0)
    with torch.no_grad():
        model = Model(
            family=config.model_type,
            parallel=bool(getattr(config, "use_parallel_residual", False)),
            W_E=bridge.embed.original_component.weight,
            W_pos=bridge.pos_embed.original_component.weight if hasattr(bridge, "pos_embed") else None,
            embed_scale=float(scale),
            rotary=rotaries.get(GLOBAL),
            activation=activation,
            blocks=tuple(_block(block, rotaries) for block in bridge.blocks),
            final_norm=_norm(bridge, "ln_final"),
            W_U=bridge.unembed.original_component.weight,
            b_U=bridge.unembed.original_component.bias,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            max_length=config.max_position_embeddings,
        )
        return _map_tensors(model, lambda tensor: tensor.detach().contiguous())


def _fill_up_biases(hf: Any) -> None:
    """Zeros where a GPT-NeoX has no attention bias: the bridge (4.3.0) knows it with biases alone."""
    for module in hf.modules():
        joint = getattr(module, "query_key_value", None)
        if isinstance(joint, torch.nn.Linear) and joint.bias is None:
            joint.bias = torch.nn.Parameter(joint.weight.new_zeros(joint.out_features))


def _block(block: Any, rotaries: dict[str, Rotary]) -> Block:
    attention, mlp, hf = block.attn, block.mlp, block.attn.original_component
    kind = getattr(hf, "layer_type", GLOBAL)
    weights = {name: getattr(attention, f"W_{name}").transpose(0, 1) for name in ("Q", "K", "V")}
    biases = {name: getattr(attention, f"b_{name}") for name in weights}
    if any(bias is not None for bias in biases.values()):  # of some of the three alone: the engine reads all or none
        biases = {
            name: weights[name].new_zeros(weights[name].shape[1:]) if bias is None else bias
            for name, bias in biases.items()
        }
    return Block(
        attention_norm=_norm(block, "ln1"),
        mlp_norm=_norm(block, "ln2"),
        attention_post_norm=_norm(block, "ln1_post"),
        mlp_post_norm=_norm(block, "ln2_post"),
        W_Q=weights["Q"],
        W_K=weights["K"],
        W_V=weights["V"],
        W_O=attention.W_O,
        b_Q=biases["Q"],
        b_K=biases["K"],
        b_V=biases["V"],
        b_O=attention.b_O,
        attention_scale=hf.scaling,  # holds GPT-2's inverse-layer factor too
        attention_softcap=getattr(hf, "attn_logit_softcapping", None),
        # Of a layer in families whose layers differ, else of the model (Mistral).
        window=getattr(hf, "sliding_window", getattr(hf.config, "sliding_window", None)),
        W_in=mlp.W_in,
        W_gate=mlp.W_gate,
        W_out=mlp.W_out,
        b_in=mlp.b_in,
        b_out=mlp.b_out,
        query_norm=_head_norm(hf, "q_norm", weights["Q"]),
        key_norm=_head_norm(hf, "k_norm", weights["K"]),
        rotary=None if kind == GLOBAL else rotaries.get(kind),
    )


def _head_norm(attention: Any, name: str, weight: Tensor) -> Norm | None:
    """A norm of queries or keys, whose projection has the weight [d, n, k], where the family has one: head by head, or
    of all n together.
    """
    norm = _norm(attention, name)
    if norm is None or norm.weight.shape == weight.shape[2:]:
        return norm
    return replace(norm, weight=norm.weight.view(weight.shape[1:]))


def _rotaries(module: Any) -> dict[str, Rotary]:
    """The rotary positions of a Hugging Face module by the kind of layer that they are for; most models have one."""
    if not isinstance(module.rope_type, dict):
        return {GLOBAL: _rotary(module)}
    if other := sorted({rope for rope in module.rope_type.values() if rope not in ("default", "linear")}):
        raise UserError(f"model: rope_type {', '.join(other)} of layers that differ; allowed there: default, linear")
    return {
        kind: Rotary(
            getattr(module, f"{kind}_inv_freq").float(), None, 0, float(getattr(module, f"{kind}_attention_scaling"))
        )
        for kind in module.rope_type
    }


def _rotary(module: Any) -> Rotary:
    """The frequencies of a Hugging Face rotary module. Of the kinds whose frequencies change with the prompt's length
    only longrope's do so within the model's context; it swaps them when it is called.
    """
    short = module.inv_freq.float().clone()
    if module.rope_type != "longrope":
        return Rotary(short, None, 0, float(module.attention_scaling))
    length = module.config.rope_parameters["original_max_position_embeddings"]
    module(short, torch.arange(length + 1)[None])
    long = module.inv_freq.float().clone()
    module(short, torch.arange(1)[None])
    return Rotary(short, long, length, float(module.attention_scaling))


def _norm(parent: Any, name: str) -> Norm | None:
    """The norm of that name, where the family has one; what it should have and is not found, the gate sees."""
    norm = getattr(parent, name, None)
    norm = getattr(norm, "original_component", norm)
    if norm is None or isinstance(norm, torch.nn.Identity):
        return None
    if isinstance(norm, torch.nn.LayerNorm):
        return Norm(norm.weight, norm.bias, norm.eps, rms=False)
    gemma = type(norm).__name__.startswith("Gemma")
    return Norm(
        1 + norm.weight.float() if gemma else norm.weight, None, norm.eps if gemma else norm.variance_epsilon, rms=True
    )
