"""Lenses before few-shot prompts with true and with permuted labels."""

from pathlib import Path

from oacore.config.run import Config
from oacore.inputs import model_source
from oacore.jobs import Files
from oacore.lenses.labelled import few_shot, read_examples
from oacore.lenses.task import LensTask
from oacore.lenses.truthfulness import truthfulness_table
from oacore.store.artefacts import write_table


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write truthfulness.csv."""
    opened = LensTask.open(config, inputs, task, inputs.all("lenses"))
    settings, loaded = opened.settings.truthfulness, opened.loaded
    assert settings is not None
    # Only the demo model has a data set of its own, beside it.
    paths = inputs.all("datasets") or [Path(model_source(config, inputs["model"])) / "labels.csv"]
    prompts = {
        (path.stem, demonstrations): few_shot(
            read_examples(path),
            loaded.tokenizer,
            n_demonstrations=settings.n_demonstrations,
            n_inputs=settings.n_inputs,
            permuted=demonstrations == "permuted",
            seed=config.seed,
            max_length=loaded.model.max_length,
            template=settings.template,
            separator=settings.separator,
        )
        for path in paths
        for demonstrations in ("true", "permuted")
    }
    lenses = list(opened.lenses(settings.lenses).values())
    table = truthfulness_table(loaded.model, lenses, prompts, config.limits.tokens_per_batch)
    write_table(outputs["table"], table, opened.provenance)
