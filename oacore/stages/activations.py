"""Cache the model's clean activations on a task's prompts."""

from oacore.config.run import Config
from oacore.engine.activations import find_rows, write_activations
from oacore.inputs import gated_model, made_by, read_splits
from oacore.jobs import Files


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write activations.h5."""
    model = gated_model(config, inputs["model"]).model
    splits, provenance = read_splits(config, inputs, task)
    provenance = provenance.noting(made_by=made_by(config, __name__))
    path = outputs["activations"]
    known = find_rows(path.parents[1].glob(f"{task}-*/{path.name}"), provenance)
    write_activations(path, model, splits, provenance, tokens_per_batch=config.limits.tokens_per_batch, known=known)
