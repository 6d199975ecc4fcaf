"""Cache the model's clean activations on a task's prompts."""

from oacore.activations import write_activations
from oacore.config import Config
from oacore.layout import Layout
from oacore.stages.common import gated_model, read_splits, stamp


def run(config: Config, task: str) -> None:
    """Write activations.h5."""
    layout = Layout(config)
    model = gated_model(config, layout).model
    splits, belongs = read_splits(config, layout, task)
    metadata = stamp(config, layout, task) | belongs
    write_activations(layout.activations(task), model, splits, metadata, tokens_per_batch=config.limits.tokens_per_batch)
