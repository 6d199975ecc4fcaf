"""Cache the model's clean activations on a task's prompts."""

from oacore.activations import read_prompts, write_activations
from oacore.config import Config
from oacore.layout import SPLITS, Layout
from oacore.stages.common import gated_model, need, stamp


def run(config: Config, task: str) -> None:
    """Write activations.h5."""
    layout = Layout(config)
    model = gated_model(config, layout).model
    path = need(layout.prompts(task), "prompts")
    identity = stamp(config, layout, task)
    splits = {split: read_prompts(path, split, {"model_hash": identity["model_hash"]}) for split in SPLITS}
    hashes = {split: prompts.digest() for split, prompts in splits.items()}
    write_activations(
        layout.activations(task), model, splits, {**identity, "prompts_hash": hashes}, tokens_per_batch=config.limits.tokens_per_batch
    )
