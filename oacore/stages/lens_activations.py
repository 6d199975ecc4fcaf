"""Cache what lenses read at every position: wanted only by `lenses.positions: all`."""

from oacore.activations import read_prompts, write_every_position
from oacore.config import Config
from oacore.layout import SPLITS, Layout
from oacore.stages.common import gated_model, need, stamp


def run(config: Config, task: str) -> None:
    """Write activations-all.h5."""
    layout = Layout(config)
    model = gated_model(config, layout).model
    identity = stamp(config, layout, task)
    path = need(layout.prompts(task), "prompts")
    splits = {split: read_prompts(path, split, {"model_hash": identity["model_hash"]}) for split in SPLITS}
    metadata = {**identity, "prompts_hash": {split: prompts.digest() for split, prompts in splits.items()}}
    write_every_position(layout.lens_rows(task), model, splits, metadata, tokens_per_batch=config.limits.tokens_per_batch)
