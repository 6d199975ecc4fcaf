"""Generate a task's prompts for the model's tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from oacore.config.run import Config
from oacore.config.tasks import task_row
from oacore.engine.clean import Batch
from oacore.engine.forward import embed, last_residual_from, logits_of
from oacore.engine.parity import PARITY_TOLERANCE, check_parity, hugging_face_logits
from oacore.errors import UserError
from oacore.inputs import gated_model, model_source, provenance_of, settings_with_file
from oacore.jobs import Files
from oacore.models.hub import load_hugging_face, load_tokenizer
from oacore.models.weights import Model
from oacore.store.artefacts import read_json
from oacore.tasks.generate import generate
from oacore.tasks.prompts import SPLITS, Complete, Ints, Prompts, called
from oacore.tasks.stored import write_prompts

N_LONGEST = 4  # prompts of a task, as many as the gate has of random ones


def run(config: Config, inputs: Files, outputs: Files, task: str) -> None:
    """Write prompts.h5: all splits. Only a task of what the model completes rightly runs the model, and one of longer
    prompts than the parity gate has seen.
    """
    settings, facts = settings_with_file(config, inputs["model"], task), read_json(inputs["model"])
    complete: Complete | None = None
    if task_row(task).completed:
        loaded = gated_model(config, inputs["model"])
        tokenizer, complete = loaded.tokenizer, argmax_of(loaded.model, config.limits.tokens_per_batch)
    else:
        source = model_source(config, inputs["model"])
        tokenizer = load_tokenizer(source, facts["revision"] or config.revision)
    splits = _all_splits(task, settings, tokenizer, config.seed, complete)
    _check_sizes(task, splits, facts["sizes"], tokenizer)
    check_long_prompts(config, inputs["model"], task, splits)
    provenance = provenance_of(config, inputs["model"], task)
    described = {"settings": settings.model_dump(mode="json"), "example": example(splits["test"], tokenizer)}
    write_prompts(outputs["prompts"], splits, provenance.noting(**described))
    counts = ", ".join(f"{len(prompts.tokens)} {split}" for split, prompts in splits.items())
    print(f"{task}: {counts} prompts")


def _all_splits(task: str, settings: Any, tokenizer: Any, seed: int, complete: Complete | None) -> dict[str, Prompts]:
    """The task's prompts by split.

    Raises:
        UserError: what is wrong, of all splits at once.
    """
    splits, wrong = dict[str, Prompts](), dict[str, None]()
    for split in SPLITS:
        try:
            splits[split] = generate(task, settings, tokenizer, seed, split, complete)
        except UserError as error:
            wrong[str(error)] = None
    if wrong:
        raise UserError("; ".join(wrong))
    return splits


def _check_sizes(task: str, splits: dict[str, Prompts], sizes: dict[str, int], tokenizer: Any) -> None:
    """UserError where a prompt is longer than the model's context, or has a token that the model has not."""
    longest = max(int(prompts.lengths.max()) for prompts in splits.values())
    if longest > sizes["max_length"]:
        raise UserError(
            f"tasks.{task}: its longest prompt has {longest} tokens; allowed: {sizes['max_length']}, the model's "
            "context"
        )
    arrays = [
        ids for part in splits.values() for ids in (part.tokens, part.counterfactual, part.answers, part.wrong_answers)
    ]
    if (largest := max(int(ids.max()) for ids in arrays)) >= sizes["d_vocab"]:
        raise UserError(
            f"tasks.{task}: {called(tokenizer)} has the id {largest} for {tokenizer.decode([largest])!r}; allowed: ids "
            f"below {sizes['d_vocab']}, the model's vocabulary, as of a tokenizer that belongs to the model"
        )


def check_long_prompts(config: Config, model_json: Path, task: str, splits: dict[str, Prompts]) -> None:
    """The parity gate on the task's longest prompts, where they are longer than the random ones that it has seen: a
    window or rotary scaling may begin to matter there. To load Hugging Face's model anew takes a second and more.

    Raises:
        UserError: our log-probabilities differ from Hugging Face's.
    """
    facts = read_json(model_json)
    every = [row[:length] for part in splits.values() for row, length in zip(part.tokens, part.lengths, strict=True)]
    rows = [torch.from_numpy(row).long()[None] for row in sorted(every, key=len)[-N_LONGEST:]]
    lengths = [torch.tensor([row.shape[1]]) for row in rows]
    if lengths[-1] <= facts["parity"]["longest"]:
        return
    source, revision = model_source(config, model_json), facts["revision"] or config.revision
    hf = load_hugging_face(source, revision=revision, dtype=config.dtype)
    expected = [hugging_face_logits(hf, *prompt) for prompt in zip(rows, lengths, strict=True)]
    del hf  # as large as ours
    model = gated_model(config.model_copy(update={"device": "cpu"}), model_json).model
    try:
        found = [
            check_parity(model, *prompt, PARITY_TOLERANCE[config.dtype]).max_abs_log_prob
            for prompt in zip(rows, lengths, expected, strict=True)
        ]
    except UserError as error:
        raise UserError(f"tasks.{task}: on its prompts of up to {int(lengths[-1])} tokens: {error}") from None
    print(f"{task}: parity with Hugging Face {max(found):.2g} nats on the {len(rows)} longest prompts")


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
        prompts = Batch(
            torch.from_numpy(tokens).long().to(model.device), torch.from_numpy(lengths).long().to(model.device)
        )
        answers = [
            logits_of(model, last_residual_from(model, 0, embed(model, part.tokens), part.lengths - 1)).argmax(-1)
            for part in prompts.split(tokens_per_batch)
        ]
        return torch.cat(answers).cpu().numpy().astype(np.int32)

    return complete
