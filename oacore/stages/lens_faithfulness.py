"""Change residuals, and compare how lenses and model react."""

from oacore.activations import batch_of
from oacore.artefacts import write_table
from oacore.config import Config
from oacore.errors import UserError
from oacore.faithfulness import faithfulness
from oacore.lens import read_rows
from oacore.stages.lens_setting import Setting

TRAIN_ROWS = 10_000  # that directions are whitened by


def run(config: Config, task: str) -> None:
    """Write faithfulness.csv."""
    assert config.lenses is not None and config.lenses.faithfulness is not None
    settings, setting = config.lenses.faithfulness, Setting.open(config, task)
    model = setting.loaded.model
    layers = settings.layers if settings.layers is not None else tuple(range(model.n_layers))
    if beyond := [layer for layer in layers if layer >= model.n_layers]:
        raise UserError(f"lenses.faithfulness.layers: {', '.join(map(str, beyond))}; allowed: 0 to {model.n_layers - 1}")
    test = batch_of(setting.splits["test"], model.device).take(slice(0, settings.n_prompts))
    train = read_rows(setting.rows, "train", setting.expect, model.device, TRAIN_ROWS)
    table = faithfulness(
        model,
        setting.lenses(settings.lenses),
        test,
        train.residual,
        layers,
        n_directions=settings.n_directions,
        resample_sizes=settings.resample_sizes,
        target_kl=settings.target_kl,
        seed=config.seed,
        tokens_per_batch=config.limits.tokens_per_batch,
    )
    write_table(setting.layout.lens(task, "faithfulness.csv"), table, setting.expect)
