"""Fit optimal ablation's constants for causal tracing: one for each place, and one for the corrupted run."""

from pathlib import Path

import torch

from oacore import corruption
from oacore.codehash import codehash
from oacore.config import Config
from oacore.layout import short_hash
from oacore.stages.tracing_setting import Setting
from oacore.tracing import NOWHERE


def run(config: Config) -> None:
    """Write constants.safetensors."""
    setting = Setting.open(config)
    _ = setting.pictured  # a wish that can't be met is said before the fit
    own = [*setting.places] if "oat" in setting.tracing.corruptions else []
    places = [*own, NOWHERE]
    settings = setting.tracing.fit
    metadata = setting.identity | {"settings": settings.model_dump()}
    path = Path(setting.layout.tracing("constants.safetensors"))
    checkpoint = path.with_name(f".{path.stem}-checkpoint.safetensors")
    found = corruption.fit(
        setting.loaded.model,
        places,
        setting.recall["train"],
        setting.recall["validation"],
        setting.statistics,
        settings,
        seed=config.seed,
        tokens_per_batch=config.limits.tokens_per_batch,
        checkpoint=checkpoint,
        identity=short_hash([metadata, [item.name for item in places], codehash("oacore.corruption"), torch.__version__]),
    )
    corruption.save(path, places, found, metadata)
    checkpoint.unlink(missing_ok=True)
    print(f"OAT: {int(found.converged.sum())} of {len(places)} constants converged in {int(found.n_steps.max())} steps or fewer")
