"""Lenses before few-shot prompts with true and with permuted labels."""

from pathlib import Path

import torch

from oacore.config.run import Config
from oacore.inputs import items_of, model_source
from oacore.jobs import Files
from oacore.lenses.labelled import FewShot, few_shot, read_examples
from oacore.lenses.task import LensTask
from oacore.lenses.truthfulness import label_log_probs, truthfulness_table
from oacore.store.artefacts import write_table
from oacore.store.items import Item


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
    items = items_of(
        config,
        inputs,
        "truthfulness",
        opened.provenance,
        ["train"],
        ["oacore.lenses.truthfulness", "oacore.lenses.labelled"],
        settings=settings.model_dump(exclude={"lenses", "datasets"}),
        positions=opened.settings.positions,
    )
    log_probs = {}
    for (name, demonstrations), shots in prompts.items():

        def compute(new: list[int], shots: FewShot = shots) -> list[Item]:
            asked = [lenses[index] for index in new]
            found = label_log_probs(loaded.model, asked, shots, config.limits.tokens_per_batch)
            return [Item({"log_probs": values}) for values in found]

        own = [{"prompts": shots.digest()} | opened.determined_by(lens) for lens in lenses]
        found = items.get(own, compute, f"{task} lenses after {demonstrations} demonstrations of {name}")
        log_probs[name, demonstrations] = torch.stack([item.tensors["log_probs"] for item in found])
    write_table(outputs["table"], truthfulness_table(lenses, prompts, log_probs), opened.provenance)
