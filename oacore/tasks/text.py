"""Windows of running text, for lenses and for ablation on general text.

A passage is a string of a JSON list, a .txt file of a directory, or a block between blank lines, or a line, of a single
text file.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from oacore.errors import UserError
from oacore.tasks.counts import FileSizes, counts, spoken, wanted_of
from oacore.tasks.prompts import (
    SPLITS,
    Prompts,
    bos_id,
    build,
    called,
    ids_and_offsets,
    read_text,
    split_of,
    stream,
    without_token,
)

KEY = "tasks.text.path"


def passages(path: Path, of_file: str = "paragraphs") -> list[str]:
    """The passages of a JSON list, a directory of .txt files or a text file, whose paragraphs or lines they are; raises
    UserError where there are none.
    """
    if path.is_dir():
        texts = [read_text(file, KEY) for file in sorted(path.glob("*.txt"))]
    elif path.suffix.lower() == ".json":
        try:
            texts = json.loads(read_text(path, KEY))
        except json.JSONDecodeError as error:
            raise UserError(f"{KEY}: {path} is not JSON: {error}") from None
        if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
            raise UserError(f"{KEY}: {path} is not a JSON list of strings, which is the only JSON allowed")
    else:
        texts = re.split(r"\n" if of_file == "lines" else r"\n\s*\n", read_text(path, KEY))
    texts = [text for passage in texts if (text := passage.strip())]
    if not texts:
        raise UserError(
            f"{KEY}: {path} holds no text; a JSON list of strings, a text file or a directory of .txt files is needed"
        )
    return texts


def generate(settings: Any, tokenizer: Any, seed: int, split: str, *, complete: Any = None) -> Prompts:
    """Windows of `settings.n_tokens` tokens, BOS included, cut from the split's passages where `settings.windows` says,
    and sampled with the seed.

    Answers [N, 1]: the token that follows the window in its passage; wrong answers [N, 1]: -1. Counterfactual: a window
    of another passage of the split. `complete` is not used.
    Passages with a token that the tokenizer does not know are left out and counted (meta n_unknown).
    Raises UserError for an unreadable or empty file, and where splits have too few windows, of all at once.
    """
    rng = stream(seed, split)
    path, size = Path(settings.path), settings.n_tokens - 1
    # A window that occurs twice belongs to the passage that has it first, so that common openings don't leak between
    # splits.
    windows: dict[tuple[int, ...], tuple[int, int]] = {}  # ids -> (passage, next id)
    texts = passages(path, settings.passages)
    unknown, split_of_passage = 0, [split_of(text) for text in texts]
    for i, text in enumerate(texts):
        ids, offsets = ids_and_offsets(tokenizer, text)
        if (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids) or without_token(text, offsets):
            unknown += 1
            continue
        for start in _starts(settings.windows, len(ids) - size, size, [seed, i]):
            windows.setdefault(tuple(ids[start : start + size]), (i, ids[start + size]))
    of_split = [(window, i, id_) for window, (i, id_) in windows.items() if split_of_passage[i] == split]
    owners = np.array([i for _, i, _ in of_split], np.int64)  # sorted: passages were read in order
    if len(set(owners.tolist())) < 2:
        raise UserError(
            f"{KEY}: {path} has {len(set(owners.tolist()))} passages of at least {settings.n_tokens} tokens "
            f"(tasks.text.n_tokens) in the {split} split, out of {len(texts)} passages ({unknown} with words unknown "
            f"to {called(tokenizer)}); at least 2 are needed"
        )
    splits = [split_of_passage[i] for i, _ in windows.values()]
    wanted = counts(settings, "tasks.text", f"{path}", splits, "distinct windows")[split]
    bos = bos_id(tokenizer)
    chosen = rng.choice(len(of_split), wanted, replace=False)
    counterfactuals = []
    for i in chosen:
        first, end = np.searchsorted(owners, owners[i], "left"), np.searchsorted(owners, owners[i], "right")
        # Uniform over the windows outside of first..end, the passage's own.
        j = rng.integers(len(of_split) - (end - first))
        counterfactuals.append([bos, *of_split[j if j < first else j + end - first][0]])
    meta: dict[str, str | int] = {"n_passages": len(texts), "n_unknown": unknown, "n_windows": len(of_split)}
    prompts = [[bos, *of_split[i][0]] for i in chosen]
    answers, wrong = [[of_split[i][2]] for i in chosen], [[-1]] * wanted
    return build(
        "text",
        split,
        [tokenizer.decode(ids[1:]) for ids in prompts],
        prompts,
        counterfactuals,
        answers,
        wrong,
        meta=meta,
        cluster=owners[chosen].tolist(),
    )


def _starts(where: str, end: int, size: int, seed: list[int]) -> range:
    """Where a passage's windows of `size` tokens begin, all before `end`; the first place may be drawn."""
    if where == "first":
        return range(min(1, max(0, end)))
    first = int(np.random.default_rng(seed).integers(size)) if where == "anywhere" else 0
    return range(first, end, size)


def sizes(settings: Any, path: Path) -> FileSizes:
    """What there will be, as far as can be seen without a tokenizer: shares are of windows of words."""
    size = settings.n_tokens - 1
    has = Counter(
        split_of(text)
        for i, text in enumerate(passages(path, settings.passages))
        for _ in _starts(settings.windows, spoken(text) - size, size, [0, i])
    )
    n_train, n_validation, n_test = (wanted_of(getattr(settings, f"n_{split}"), has[split]) for split in SPLITS)
    return FileSizes(n_train, n_validation, n_test, settings.n_tokens)
