"""Lenses before few-shot prompts with true and with permuted labels."""

from pathlib import Path

from oacore.artefacts import write_table
from oacore.config import Config
from oacore.stages.lens_setting import Setting
from oacore.tasks.labelled import few_shot, read
from oacore.truthfulness import truthfulness


def run(config: Config, task: str) -> None:
    """Write truthfulness.csv."""
    assert config.lenses is not None and config.lenses.truthfulness is not None
    settings, setting = config.lenses.truthfulness, Setting.open(config, task)
    paths = settings.datasets if settings.datasets is not None else (Path(setting.layout.source) / "labels.csv",)
    prompts = {
        (path.stem, demonstrations): few_shot(
            read(path.expanduser()),
            setting.loaded.tokenizer,
            n_demonstrations=settings.n_demonstrations,
            n_inputs=settings.n_inputs,
            permuted=demonstrations == "permuted",
            seed=config.seed,
            max_length=setting.loaded.model.max_length,
            template=settings.template,
            separator=settings.separator,
        )
        for path in paths
        for demonstrations in ("true", "permuted")
    }
    table = truthfulness(setting.loaded.model, setting.lenses(settings.lenses), prompts, config.limits.tokens_per_batch)
    write_table(setting.layout.lens(task, "truthfulness.csv"), table, setting.expect)
