"""Fit one lens to cached rows."""

from pathlib import Path

import torch

from oacore import lens as lenses
from oacore.activations import batch_of
from oacore.codehash import codehash
from oacore.config import Config, LensName
from oacore.layout import short_hash
from oacore.stages.lens_setting import Setting


def run(config: Config, task: str, lens: str) -> None:
    """Write {lens}.safetensors."""
    assert config.lenses is not None
    setting = Setting.open(config, task)
    model = setting.loaded.model
    kind, _, init = lens.partition("-")
    name: LensName = kind  # type: ignore[assignment]  # the config's own
    settings = config.lenses.oca if name in ("oca", "oca_shared") else config.lenses.tuned
    jacobian = None
    if name == "grad":
        prompts = batch_of(setting.splits["train"], model.device).take(slice(0, config.lenses.grad_prompts))
        jacobian = lenses.mean_jacobian(model, prompts, config.limits.tokens_per_batch)
    metadata = setting.identity | {"settings": settings.model_dump(), "file": lens}
    path = Path(setting.path(lens))
    checkpoint = path.with_name(f".{path.stem}-checkpoint.safetensors")
    found, descent = lenses.fit(
        model,
        name,
        init,
        setting.rows,
        setting.expect,
        settings,
        seed=config.seed,
        teacher=setting.lens("oca") if name == "linear_oca" else None,
        jacobian=jacobian,
        checkpoint=checkpoint,
        identity=short_hash([metadata, codehash("oacore.lens"), torch.__version__]),
    )
    lenses.save(path, found, metadata, descent)
    checkpoint.unlink(missing_ok=True)
    print(f"{task} {lens}: {int(descent.converged.sum())} of {len(descent.converged)} fits converged in {int(descent.n_steps.max())} steps")
