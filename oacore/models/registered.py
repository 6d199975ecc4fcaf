"""A model of one's own class as a model directory: canonical weights, a tokenizer, and what its own forward pass says
of the gate's tokens.

The directory is data: whoever loads it runs none of its maker's code, and the parity gate holds our forward pass
against the stored logits anew.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oacore.config.model import REGISTERED, REGISTERED_FILE
from oacore.errors import UserError
from oacore.models.stored import read_model, write_model
from oacore.models.weights import DTYPES, Model, _map_tensors
from oacore.store.artefacts import read_json, write_json
from oacore.store.fingerprint import fingerprint
from oacore.store.layout import WEIGHTS

GATE = "gate.safetensors"
# Right-padded tokens [N, T], lengths [N], logits [N, T, V] of its own forward pass.
Gate = tuple[Tensor, Tensor, Tensor]


def is_registered(source: str | Path) -> bool:
    """Whether this is a directory that `write_registered` has written."""
    return (Path(source).expanduser() / REGISTERED_FILE).is_file()


def write_registered(folder: Path, model: Model, tokenizer: Any, gate: Gate) -> None:
    """Write all that there is of a model into a folder."""
    write_model(folder / WEIGHTS, model)
    save_file(dict(zip(("tokens", "lengths", "logits"), gate, strict=True)), folder / GATE)
    tokenizer.save_pretrained(folder)
    sizes = {
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "d_head": model.d_head,
        "d_model": model.d_model,
        "d_mlp": model.blocks[0].W_in.shape[1],
        "d_vocab": model.d_vocab,
        "n_positions": 0 if model.W_pos is None else len(model.W_pos),
        "gated": model.blocks[0].W_gate is not None,
        "tied": model.W_U.data_ptr() == model.W_E.data_ptr(),
        "parallel": model.parallel,
        "rms": not model.centred,
    }
    files = {name: fingerprint(folder / name) for name in (WEIGHTS, GATE)}
    write_json(folder / REGISTERED_FILE, {"model_type": REGISTERED, "sizes": sizes, "files": files})


def read_registered(source: str | Path, dtype: str = "fp32") -> Model:
    """The canonical weights of a directory, on the CPU.

    Raises:
        UserError: a file is missing, damaged or edited.
    """
    folder = Path(source).expanduser()
    model = read_model(folder / WEIGHTS, read_json(folder / REGISTERED_FILE)["files"][WEIGHTS])
    cast: Model = _map_tensors(model, lambda tensor: tensor.to(DTYPES[dtype]))
    blocks = (replace(new, rotary=old.rotary) for new, old in zip(cast.blocks, model.blocks, strict=True))
    return replace(cast, rotary=model.rotary, blocks=tuple(blocks))  # angles stay in fp32


def read_gate(source: str | Path) -> Gate:
    """What its own forward pass says, of a directory.

    Raises:
        UserError: the file is damaged or edited.
    """
    folder = Path(source).expanduser()
    if fingerprint(folder / GATE) != read_json(folder / REGISTERED_FILE)["files"][GATE]:
        raise UserError(f"{folder / GATE}: damaged or edited, its checksum does not fit; register the model anew")
    stored = load_file(folder / GATE)
    return stored["tokens"], stored["lengths"], stored["logits"]


def word_tokenizer(words: Sequence[str]) -> Any:
    """A fast tokenizer of words between blanks, whose ids are their places; the first, BOS, begins every prompt and is
    no word of it.

    Raises:
        UserError: a word twice, or with a blank.
    """
    if wrong := [word for word, times in Counter(words).items() if times > 1 or word.split() != [word]]:
        raise UserError(f"register: tokenizer: the words {wrong[:5]}; allowed: each once, and without blanks")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], unk_token=words[0])


def own_logits(logits: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits [N, T, V] of somebody's forward pass, prompt by prompt without padding; zeros where there is none.

    Raises:
        UserError: it gives something else.
    """
    rows = []
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        with torch.no_grad():
            found = logits(row[None, :length])
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(shape, list) or len(shape) != 3 or shape[:2] != [1, length]:
            raise UserError(
                f"register: logits gives {shape} of tokens [1, {length}]; allowed: a tensor [1, {length}, V]"
            )
        rows.append(torch.nn.functional.pad(found[0].float().cpu(), (0, 0, 0, len(row) - length)))
    return torch.stack(rows)
