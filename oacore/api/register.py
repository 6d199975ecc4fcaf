"""A model of one's own class."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from oacore.config.model import REGISTERED
from oacore.engine.parity import OWN, PARITY_TOLERANCE, check_parity, parity_prompts
from oacore.errors import UserError
from oacore.models.form import check_form
from oacore.models.registered import is_registered, own_logits, word_tokenizer, write_registered
from oacore.models.weights import Model, _map_tensors
from oacore.store.atomic import atomic_directory


def register(
    path: str | Path, weights: Model, tokenizer: Any | Sequence[str], logits: Callable[[Tensor], Tensor]
) -> str:
    """Write a model of your own as a model directory, which `load` and the config's `model:` take as any other:
    docs/extending.md.

    The directory is data. What it needs of your code is asked for here: the logits of random prompts up to the model's
    whole context, against which the parity gate holds our forward pass, now and whenever the directory is loaded.

    Args:
        path: of the directory; one that was registered before is replaced.
        weights: canonical, `oacore.models.weights.Model`; a part that is not there, such as a norm, is left out.
        tokenizer: a Hugging Face fast tokenizer, or the words of the vocabulary by their ids, BOS first.
        logits: your own forward pass in evaluation mode, tokens [1, T] -> logits [1, T, V].

    Returns:
        The path, to be loaded.

    Raises:
        UserError: weights of a form that the engine does not compute, logits that are not those of our forward pass, or
            another folder of that name.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not is_registered(folder):
        raise UserError(f"register: {str(path)!r} exists; allowed: a new directory, or one that was registered")
    check_form(weights)
    model = replace(_map_tensors(weights, lambda tensor: tensor.detach().float().cpu().contiguous()), family=REGISTERED)
    tokens, lengths = parity_prompts(model.d_vocab, model.max_length, longest=model.max_length)
    expected = own_logits(logits, tokens, lengths)
    check_parity(model, tokens, lengths, expected, PARITY_TOLERANCE["fp32"], of=OWN)
    with atomic_directory(folder) as temporary:
        fast = word_tokenizer(tokenizer) if isinstance(tokenizer, list | tuple) else tokenizer
        write_registered(temporary, model, fast, (tokens, lengths, expected))
    return str(path)
