"""A model that has passed the parity gate."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oacore.api.settings import config_of, given
from oacore.config.model import DEMO
from oacore.running import run_behind
from oacore.store.artefacts import read_json


@dataclass(frozen=True, repr=False)
class Model:
    """Make it with `load`.

    Args:
        settings: the keys of the config that are not about an experiment.
        facts: model.json: family, sizes, weight hash, parity.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        sizes, parity = self.facts["sizes"], self.facts["parity"]
        return (
            f"{self.facts['model']}: {self.facts['family']}, {sizes['n_layers']} layers of {sizes['n_heads']} heads, "
            f"width {sizes['d_model']}, {sizes['n_edges']} edges; "
            f"parity with {parity['of']} {parity['max_abs_log_prob']:.2g} nats"
        )


def load(
    model: str | Path = DEMO,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["fp32", "bf16"] = "fp32",
    precision: Literal["auto", "ieee", "tf32"] = "auto",
    revision: str | None = None,
    seed: int = 0,
    cache_dir: str | Path = "cache",
    results_dir: str | Path = "results",
    **limits: Any,
) -> Model:
    """Load a model through the parity gate: its log-probabilities must be Hugging Face's, or a registered model's own.

    Args:
        model: `demo`, which is shipped, a Hugging Face name, or a local directory, such as `register` writes.
        seed: of prompts, fits and resampling.
        cache_dir: what runs share, with those of the pipeline: models, prompts, activations, items.
        results_dir: tables and figures, a folder for each experiment.
        limits: `threads`, `tokens_per_batch`, `memory_gb`.

    Raises:
        UserError: no such model, one that the engine can't compute, or another bad setting.
    """
    settings = {
        "model": str(model),
        "device": device,
        "dtype": dtype,
        "precision": precision,
        **given(revision=revision),
        "seed": seed,
        "cache_dir": str(cache_dir),
        "results_dir": str(results_dir),
        "limits": limits,
    }
    layout = run_behind(config_of(settings, {"ioi": {}}), "model")  # a config has a task; the gate asks for none
    return Model(settings, read_json(layout.model_json))
