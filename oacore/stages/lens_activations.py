"""Cache what lenses read at every position: wanted only by `lenses.positions: all`."""

from oacore.activations import write_every_position
from oacore.config import Config
from oacore.layout import Layout
from oacore.stages.common import gated_model, read_splits, stamp


def run(config: Config, task: str) -> None:
    """Write activations-all.h5."""
    layout = Layout(config)
    model = gated_model(config, layout).model
    splits, belongs = read_splits(config, layout, task)
    metadata = stamp(config, layout, task) | belongs
    write_every_position(layout.lens_rows(task), model, splits, metadata, tokens_per_batch=config.limits.tokens_per_batch)
