"""Load the model, hold it against Hugging Face or its own forward pass (the parity gate), write down what it is."""

from dataclasses import asdict
from importlib.metadata import version

import torch

from oacore import __version__
from oacore.config.run import Config
from oacore.engine.parity import open_model
from oacore.errors import UserError
from oacore.inputs import model_source
from oacore.jobs import Files
from oacore.models.stored import write_model
from oacore.models.weights import named_tensors
from oacore.store.artefacts import write_json
from oacore.store.fingerprint import fingerprint


def run(config: Config, inputs: Files, outputs: Files) -> None:
    """Write model.json: family, sizes, revision, weight hash, parity; and the weights, where they are to be stored."""
    torch.set_num_threads(config.limits.threads)
    loaded, parity = open_model(
        model_source(config, outputs["model"]),
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        precision=config.precision,
    )
    model = loaded.model
    sizes = {
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "d_model": model.d_model,
        "d_head": model.d_head,
        "d_mlp": model.blocks[0].W_in.shape[1],
        "d_vocab": model.d_vocab,
        "max_length": model.max_length,
        "n_edges": model.graph.n_edges,
        "n_weights": sum(tensor.numel() for name, tensor in named_tensors(model).items() if "rotary." not in name),
    }
    loaded.tokenizer  # noqa: B018  a model without one is refused here
    check_depth(config, model.n_layers, model.max_length)
    stored = next(iter(outputs.named().get("weights", [])), None)
    if stored:
        write_model(stored, model)
    facts = {
        "model": config.model,
        "family": model.family,
        "parallel": model.parallel,
        "sizes": sizes,
        "dtype": config.dtype,
        "revision": loaded.revision,
        "model_hash": loaded.weight_hash,
        "parity": asdict(parity),
        "weights": fingerprint(stored) if stored else None,
        "versions": {
            "oacore": __version__,
            **{name: version(name) for name in ("torch", "transformers", "transformer-lens")},
        },
    }
    write_json(outputs["model"], facts)
    print(
        f"model: {model.family}, {model.n_layers} layers, parity with {parity.of} {parity.max_abs_log_prob:.2g} nats"
        + (f"; {parity.precision} moves {parity.precision_log_prob:.2g}" if parity.precision != "ieee" else "")
    )


def check_depth(config: Config, n_layers: int, max_length: int) -> None:
    """Refuse what the config asks for and the model has not, before anything is computed.

    Raises:
        UserError: layers beyond the last one, windows longer than the context.
    """
    faithfulness = config.lenses.faithfulness if config.lenses is not None else None
    layers = (faithfulness.layers if faithfulness is not None else None) or ()
    if beyond := [str(layer) for layer in layers if layer >= n_layers]:
        raise UserError(f"lenses.faithfulness.layers: {', '.join(beyond)}; allowed: 0 to {n_layers - 1}")
    lengths = config.lenses.lengths if config.lenses is not None else ()
    if longer := [str(length) for length in lengths if length > max_length]:
        raise UserError(f"lenses.lengths: {', '.join(longer)}; allowed: up to {max_length}, the model's context")
    windows = getattr(config.tasks.selected().get("text"), "n_tokens", 0)
    if windows > max_length:
        raise UserError(f"tasks.text.n_tokens: {windows}; allowed: up to {max_length}, the model's context")
