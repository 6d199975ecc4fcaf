"""Generate a task's prompts for the model's tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from oacore.ablation import Batch
from oacore.activations import write_prompts
from oacore.config import Config, Facts, Text
from oacore.errors import UserError
from oacore.forward import embed, last_residual_from, logits_of
from oacore.layout import SPLITS, Layout
from oacore.model import Model, load_tokenizer
from oacore.stages.common import gated_model, model_facts, model_source, stamp
from oacore.tasks import generate
from oacore.tasks.facts import Complete
from oacore.tasks.prompts import Ints, Prompts


def run(config: Config, task: str) -> None:
    """Write prompts.h5: all splits. Only facts run the model, to keep what it completes correctly."""
    layout = Layout(config)
    settings = config.tasks.selected()[task]
    facts = model_facts(layout)
    complete: Complete | None = None
    if isinstance(settings, Facts | Text):
        own = "facts.csv" if isinstance(settings, Facts) else "text.json"
        path = settings.path.expanduser() if settings.path is not None else Path(model_source(layout)) / own
        settings = settings.model_copy(update={"path": path})
    if isinstance(settings, Facts):
        loaded = gated_model(config, layout)
        tokenizer, complete = loaded.tokenizer, argmax_of(loaded.model, config.limits.tokens_per_batch)
    else:
        tokenizer = load_tokenizer(model_source(layout), facts["revision"] or config.revision)
    splits = {split: generate(task, settings, tokenizer, config.seed, split, complete) for split in SPLITS}
    longest = max(int(prompts.lengths.max()) for prompts in splits.values())
    if longest > facts["sizes"]["max_length"]:
        raise UserError(
            f"tasks.{task}: its longest prompt has {longest} tokens; allowed: {facts['sizes']['max_length']}, the model's context"
        )
    about = {"settings": settings.model_dump(mode="json"), "example": example(splits["test"], tokenizer)}
    write_prompts(layout.prompts(task), splits, {**stamp(config, layout, task), **about})
    print(f"{task}: " + ", ".join(f"{len(prompts.tokens)} {split}" for split, prompts in splits.items()) + " prompts")


def example(prompts: Prompts, tokenizer: Any) -> dict[str, str]:
    """The first prompt in words, for the report, which has no tokenizer."""
    length = prompts.lengths[0]
    answers = [int(token) for token in prompts.answers[0] if token >= 0]
    shown = [repr(tokenizer.decode([token])) for token in answers[:4]]
    more = f" and {len(answers) - len(shown)} more" if len(answers) > len(shown) else ""
    return {
        "prompt": prompts.text[0],
        "counterfactual": tokenizer.decode(prompts.counterfactual[0, 1:length]),
        "right answer": ", ".join(shown) + more,
    }


def argmax_of(model: Model, tokens_per_batch: int) -> Complete:
    """The model's most likely next token after each right-padded prompt."""

    @torch.no_grad()
    def complete(tokens: Ints, lengths: Ints) -> Ints:
        prompts = Batch(torch.from_numpy(tokens).long().to(model.device), torch.from_numpy(lengths).long().to(model.device))
        found = [
            logits_of(model, last_residual_from(model, 0, embed(model, part.tokens), part.lengths - 1)).argmax(-1)
            for part in prompts.split(tokens_per_batch)
        ]
        return torch.cat(found).cpu().numpy().astype(np.int32)

    return complete
