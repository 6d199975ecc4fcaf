"""How each family of models writes its sizes into config.json."""

from collections.abc import Callable
from typing import Any

from oacore.config.model import REGISTERED


def _gpt2(model_config: dict[str, Any]) -> dict[str, Any]:
    d, n_heads = model_config["n_embd"], model_config["n_head"]
    return {
        "n_layers": model_config["n_layer"],
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d // n_heads,
        "d_model": d,
        "d_mlp": model_config.get("n_inner") or 4 * d,
        "d_vocab": model_config["vocab_size"],
        "n_positions": model_config["n_positions"],
        "gated": False,
        "tied": True,
        "parallel": False,
        "rms": False,
    }


def _llama(model_config: dict[str, Any]) -> dict[str, Any]:
    d, n_heads = model_config["hidden_size"], model_config["num_attention_heads"]
    return {
        "n_layers": model_config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": model_config.get("num_key_value_heads") or n_heads,
        "d_head": model_config.get("head_dim") or d // n_heads,
        "d_model": d,
        "d_mlp": model_config["intermediate_size"],
        "d_vocab": model_config["vocab_size"],
        "n_positions": 0,
        "gated": True,
        "tied": model_config.get("tie_word_embeddings", False),
        "parallel": False,
        "rms": True,
    }


def _gpt_neox(model_config: dict[str, Any]) -> dict[str, Any]:
    parallel = model_config.get("use_parallel_residual", True)
    return _llama(model_config) | {"gated": False, "parallel": parallel, "rms": False}


def _qwen3(model_config: dict[str, Any]) -> dict[str, Any]:
    return _llama(model_config) | {"d_head": model_config.get("head_dim") or 128}


def _gemma2(model_config: dict[str, Any]) -> dict[str, Any]:
    return _llama(model_config) | {"tied": model_config.get("tie_word_embeddings", True)}


def _gemma3(model_config: dict[str, Any]) -> dict[str, Any]:
    return _gemma2(model_config) | {"d_head": model_config.get("head_dim") or 256}


def _registered(model_config: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = model_config["sizes"]
    return sizes


# By `model_type`, for all of `oacore.config.model.ARCHITECTURES`, and for models that `oacore.register` has written:
# the fields of `oacore.estimate.sizes.Sizes`.
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "phi3": _llama,
    "qwen2": _llama,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo2": _llama,
    REGISTERED: _registered,
}
