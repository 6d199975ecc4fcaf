"""Change residuals, and compare how lenses and model react."""

from oacore.config.run import Config
from oacore.engine.prompts import batch_of
from oacore.errors import UserError
from oacore.jobs import Files
from oacore.lenses.faithfulness import faithfulness_table
from oacore.lenses.numbers import TRAIN_ROWS
from oacore.lenses.task import LensTask
from oacore.store.artefacts import write_table


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write faithfulness.csv."""
    opened = LensTask.open(config, inputs, task, inputs.all("lenses"))
    settings, model = opened.settings.faithfulness, opened.loaded.model
    assert settings is not None
    layers = settings.layers if settings.layers is not None else tuple(range(model.n_layers))
    if beyond := [layer for layer in layers if layer >= model.n_layers]:
        raise UserError(
            f"lenses.faithfulness.layers: {', '.join(map(str, beyond))}; allowed: 0 to {model.n_layers - 1}"
        )
    table = faithfulness_table(
        model,
        list(opened.lenses(settings.lenses).values()),
        batch_of(opened.splits["test"], model.device).take(slice(0, settings.n_prompts)),
        opened.sources.cache.read("train", TRAIN_ROWS).residual,
        layers,
        n_directions=settings.n_directions,
        resample_sizes=settings.resample_sizes,
        target_kl=settings.target_kl,
        seed=config.seed,
        tokens_per_batch=config.limits.tokens_per_batch,
    )
    write_table(outputs["table"], table, opened.provenance)
