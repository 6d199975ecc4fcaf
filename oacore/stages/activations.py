"""Cache the model's clean activations on a task's prompts."""

from oacore.config.run import Config
from oacore.engine.activations import write_activations
from oacore.inputs import gated_model, read_splits
from oacore.jobs import Files


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write activations.h5."""
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    limit = config.limits.tokens_per_batch
    write_activations(outputs["activations"], model, splits, provenance, tokens_per_batch=limit)
