"""The embedded model's shape, for its training and for the estimate of memory and time.

Free of torch, because the Snakefile estimates on every dry run.
"""

from typing import Any

from oacore.config.model import DemoModel


def demo_architecture(settings: DemoModel) -> dict[str, Any]:
    """As a GPT-2's config.json has it; the vocabulary is that of `oacore.models.demo.make_tokenizer`."""
    sizes = {"n_layer": settings.n_layers, "n_head": settings.n_heads, "n_embd": settings.d_model}
    return {**sizes, "n_positions": 64, "vocab_size": 470}
