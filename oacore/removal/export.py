"""An ablation of components as a plain Hugging Face model: their rows of W_O, or of the MLP's output weights, are zero
and their constants are in the bias.

What is exported is `Components.edited`: ablated at every position, BOS included, as measured in the run's table.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oacore.config.removal import REMOVAL_METHODS
from oacore.config.run import Config
from oacore.engine.parity import PARITY_TOLERANCE, check_parity, hugging_face_logits, parity_prompts
from oacore.errors import UserError
from oacore.inputs import gated_model, model_source
from oacore.models.hub import load_hugging_face, load_tokenizer
from oacore.models.registered import is_registered
from oacore.models.weights import Model
from oacore.removal.ablated import Components
from oacore.store.artefacts import read_json, read_tensors
from oacore.store.atomic import atomic_directory
from oacore.store.layout import Layout
from oacore.store.provenance import Provenance


class Place(NamedTuple):
    """Where a family's Hugging Face model projects to the residual stream.

    Args:
        attention, mlp: the modules, with the layer's number for {}, and the names of what projects in them.
        flags: of the config, that give all projections of attention, or of MLPs, biases; empty where there is none.
    """

    attention: tuple[str, str]
    mlp: tuple[str, str]
    flags: tuple[str, str] = ("", "")


_LLAMA = ("model.layers.{}.self_attn", "o_proj"), ("model.layers.{}.mlp", "down_proj")
PLACES = {
    "gpt2": Place(("transformer.h.{}.attn", "c_proj"), ("transformer.h.{}.mlp", "c_proj")),
    "gpt_neox": Place(
        ("gpt_neox.layers.{}.attention", "dense"), ("gpt_neox.layers.{}.mlp", "dense_4h_to_h"), ("attention_bias", "")
    ),
    "llama": Place(*_LLAMA, ("attention_bias", "mlp_bias")),
    "qwen3": Place(*_LLAMA, ("attention_bias", "")),
    **{family: Place(*_LLAMA) for family in ("mistral", "phi3", "qwen2")},
}


@torch.no_grad()
def edit(hf: Any, model: Model, ablated: Components) -> None:
    """Put an ablation into the weights of a plain Hugging Face model.

    Args:
        hf: of the same weights as `model`.

    Raises:
        UserError: a constant needs a bias that the family has not and whose config knows none. Nothing is changed then.
    """
    edited, place = ablated.edited(model), PLACES[model.family]
    for layer, (block, own) in enumerate(zip(edited.blocks, model.blocks, strict=True)):
        for what, new, old, flag in (("attention", block.b_O, own.b_O, 0), ("mlp", block.b_out, own.b_out, 1)):
            if _differ(new, old) and old is None and not place.flags[flag]:
                raise UserError(
                    f"removal-export: a constant of layer {layer} needs a bias, and the {what} of a {model.family} has "
                    "none; allowed: zero ablation, other components, or a family with biases (gpt2, gpt_neox, llama)"
                )
    for layer, (block, own) in enumerate(zip(edited.blocks, model.blocks, strict=True)):
        if ablated.heads[layer].any():
            _write(hf, place.attention, layer, block.W_O.flatten(0, 1), block.b_O, own.b_O, place.flags[0])
        if ablated.mlps[layer]:
            _write(hf, place.mlp, layer, block.W_out, block.b_out, own.b_out, place.flags[1])


def _differ(new: Tensor | None, old: Tensor | None) -> bool:
    return new is not None and bool((new != (0 if old is None else old)).any())


def _write(
    hf: Any, place: tuple[str, str], layer: int, weight: Tensor, bias: Tensor | None, old: Tensor | None, flag: str
) -> None:
    """A projection's weight [in, out] and bias [out]."""
    projection = hf.get_submodule(f"{place[0].format(layer)}.{place[1]}")
    is_linear = isinstance(projection, torch.nn.Linear)  # GPT-2's are [in, out] already
    projection.weight.copy_(weight.T if is_linear else weight)
    if not _differ(bias, old):
        return
    if projection.bias is None:
        _add_biases(hf, place[0], flag)
    projection.bias.copy_(bias)


def _add_biases(hf: Any, pattern: str, flag: str) -> None:
    """Zeros for every projection of all layers' attention, or MLPs, which the config's flag then asks for."""
    setattr(hf.config, flag, True)
    for layer in range(hf.config.num_hidden_layers):
        for module in hf.get_submodule(pattern.format(layer)).modules():
            if isinstance(module, torch.nn.Linear) and module.bias is None:
                module.bias = torch.nn.Parameter(module.weight.new_zeros(module.out_features))


def export(config: Config, output: Path, method: str, ablation: str, knob: float, seed: int = 0) -> float:
    """Write an ablation of a finished run as a model directory, with its tokenizer, and read it back.

    Returns:
        The largest difference between a logit of the directory's plain model and the ablated model's.

    Raises:
        UserError: there is no such ablation, it is not one of components, the folder exists, or as `edit`.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists; allowed: a folder that does not")
    layout = Layout(config)
    ablated = _read(config, layout, method, ablation, knob, seed)
    loaded = gated_model(config, Path(layout.model_json))
    source = model_source(config, Path(layout.model_json))
    if is_registered(source):
        raise UserError(f"removal-export: {source!r} was registered; allowed: a model of a Hugging Face class")
    hf = load_hugging_face(source, revision=loaded.revision, dtype=config.dtype)
    edit(hf, loaded.model, ablated)
    tokens, lengths = parity_prompts(hf.config.vocab_size, hf.config.max_position_embeddings)
    with atomic_directory(output) as folder:
        hf.save_pretrained(folder)
        load_tokenizer(source, loaded.revision).save_pretrained(folder)
        plain = hugging_face_logits(load_hugging_face(folder, dtype=config.dtype), tokens, lengths)
        edited = ablated.edited(loaded.model)
        parity = check_parity(edited, tokens, lengths, plain, PARITY_TOLERANCE[config.dtype])
    print(
        f"{output}: {ablated.size} components ablated; logits within {parity.max_abs_logit:.1e} of the ablated model's"
    )
    return parity.max_abs_logit


def _read(config: Config, layout: Layout, method: str, ablation: str, knob: float, seed: int) -> Components:
    """An ablation of the run's."""
    settings = config.removal
    if settings is None:
        raise UserError("removal-export: the config has no removal: section; allowed: that of a finished run with one")
    exported = [name for name in settings.methods if REMOVAL_METHODS[name].unit == "component"]
    if method not in exported:
        raise UserError(
            f"--method: {method!r}; allowed: methods of the run that ablate components: {', '.join(exported) or 'none'}"
        )
    path = Path(layout.removal(f"{method}-{ablation}/ablations.safetensors"))
    required = {"model_hash": read_json(layout.model_json)["model_hash"], "method": method, "ablation": ablation}
    _, tensors = read_tensors(path, Provenance(required))
    name = f"{knob:g}-s{seed}/"
    parts = {key.removeprefix(name): part for key, part in tensors.items() if key.startswith(name)}
    if not parts:
        there = dict.fromkeys(key.partition("/")[0] for key in tensors)
        raise UserError(f"--knob, --seed: {name[:-1]}; allowed: {', '.join(there)}, as {{knob}}-s{{seed}}")
    return Components(**parts)
