"""Prompts of every task in one form, and what their generators share: encoding, splits, sampling, padding."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oacore.errors import UserError

Ints = NDArray[np.int32]
Complete = Callable[[Ints, Ints], Ints]  # (tokens [N, T], lengths [N]) -> predicted ids [N]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Prompts:
    """One split of a task: N prompts of at most T tokens, BOS at position 0, padded on the right.

    The prediction is read at the last token, position `lengths - 1`. Padding is a valid id that causal attention never
    reads.
    """

    task: str
    split: str  # "train", "validation" or "test"
    text: list[str]  # N prompts without BOS
    tokens: Ints  # [N, T]
    lengths: Ints  # [N], tokens of each prompt, BOS included
    counterfactual: Ints  # [N, T], same length as its prompt
    answers: Ints  # [N, A], ids of the correct next tokens, padded with -1
    wrong_answers: Ints  # [N, W], ids of the wrong answers, padded with -1
    subject: Ints  # [N, 2], half-open span of token positions; (-1, -1) where the task has no subject
    continuation: Ints  # [N, M], ids of the whole right answer (its first where there are several), padded with -1
    # [N], the same number for prompts that are not independent, such as facts about one subject or windows of one
    # passage: standard errors are over these.
    cluster: Ints
    meta: dict[str, str | int] = field(default_factory=dict)  # counts for the report

    def digest(self) -> str:
        """Hex SHA-256 of all arrays and their shapes: equal exactly where the model sees and is asked the same."""
        sha = hashlib.sha256()
        for array in (
            self.tokens,
            self.lengths,
            self.counterfactual,
            self.answers,
            self.wrong_answers,
            self.subject,
            self.continuation,
            self.cluster,
        ):
            sha.update(f"{array.shape}".encode() + array.astype("<i4").tobytes())
        return sha.hexdigest()


def words(text: str) -> tuple[str, ...]:
    """The blank-separated words of a literal: readable word lists."""
    return tuple(text.split())


def split_of(key: str) -> str:
    """Split of a prompt or passage: 60 % train, 20 % validation, 20 % test, by the hash of its text alone.

    No seed takes part, so splits stay disjoint whatever the seeds and sizes, and what a model was trained on is known
    for good.
    """
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.6 else "validation" if share < 0.8 else "test"


def limit(settings: Any, task: str, split: str) -> Any:
    """`settings.n_<split>`; raises UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"tasks.{task}: unknown split '{split}'; allowed are {', '.join(SPLITS)}")
    return getattr(settings, f"n_{split}")


def stream(seed: int, split: str) -> np.random.Generator:
    """Random numbers of one split: other splits of the same seed draw from other streams."""
    return np.random.default_rng([seed, SPLITS.index(split)])


def distinct(
    rng: np.random.Generator, shape: Sequence[int], render: Callable[..., str], split: str, wanted: int, task: str
) -> list[tuple[tuple[int, ...], str]]:
    """`wanted` (cell, text) of one split, drawn uniformly without replacement from the grid `shape`; `render(*cell)` is
    a cell's text.

    Raises UserError when the split holds fewer prompts.
    """
    # A split holds 20 % of the cells at least, on average: ten times the wanted number misses only where the grid
    # itself runs out.
    size = prod(shape)
    cells = rng.choice(size, min(size, 10 * wanted + 200), replace=False)
    chosen: list[tuple[tuple[int, ...], str]] = []
    for flat in cells:
        if len(chosen) == wanted:
            break
        cell = tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))
        text = render(*cell)
        if split_of(text) == split:
            chosen.append((cell, text))
    if len(chosen) < wanted:
        raise UserError(
            f"tasks.{task}.n_{split}: {wanted} wanted, but this tokenizer allows only {len(chosen)} distinct prompts "
            "in the split"
        )
    return chosen


def called(tokenizer: Any) -> str:
    """What messages call a tokenizer."""
    return f"tokenizer '{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}'"


def ids_and_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character spans in `text`, without special tokens, known or not."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def without_token(text: str, offsets: Sequence[tuple[int, int]]) -> str:
    """The first character of a text, blanks aside, that no token covers: a tokenizer without an unknown token drops it.
    Empty where there is none.
    """
    covered = {place for start, end in offsets for place in range(start, end)}
    left = (mark for place, mark in enumerate(text) if place not in covered and not mark.isspace())
    return next(left, "")


def token_text(tokenizer: Any, id_: int) -> str:
    """A token as it stands in a text, with its leading space: SentencePiece tokenizers decode a single token without
    it.
    """
    piece, text = tokenizer.convert_ids_to_tokens(id_), str(tokenizer.decode([id_]))
    return f" {text.lstrip()}" if isinstance(piece, str) and piece.startswith("\u2581") else text


def bos_id(tokenizer: Any) -> int:
    """The id at position 0: BOS, or EOS where the tokenizer has no BOS; raises UserError where it has neither."""
    for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if id_ is not None:
            return int(id_)
    raise UserError(f"{called(tokenizer)}: has neither a BOS nor an EOS token; every prompt needs one at position 0")


def encode(tokenizer: Any, text: str) -> list[int]:
    """BOS once, then the ids of `text`, and no other special token; raises UserError naming a word that the tokenizer
    does not know.
    """
    ids, offsets = ids_and_offsets(tokenizer, text)
    # Only the text's own ids are searched: GPT-2's unknown token is also its BOS.
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        start, end = offsets[ids.index(tokenizer.unk_token_id)]
        raise UserError(
            f"{called(tokenizer)}: has no token for '{text[start:end]}' in the prompt '{text}'; every word must be "
            "known"
        )
    if character := without_token(text, offsets):
        raise UserError(
            f"{called(tokenizer)}: has no token for '{character}' in the prompt '{text}'; every character must be known"
        )
    return [bos_id(tokenizer), *ids]


def following(tokenizer: Any, context: str, text: str) -> list[int]:
    """Ids of `text` right after `context`; empty where a token spans the boundary or is unknown.

    Encoding " Mary" alone would be wrong for SentencePiece tokenizers, which put a space of their own in front.
    """
    before, both = ids_and_offsets(tokenizer, context)[0], ids_and_offsets(tokenizer, context + text)[0]
    new = both[len(before) :]
    return [] if both[: len(before)] != before or tokenizer.unk_token_id in new else new


def pad(rows: Sequence[Sequence[int]], fill: int) -> Ints:
    """Rows of ids as one array [N, longest row, at least 1], filled up on the right."""
    array = np.full((len(rows), max([1, *map(len, rows)])), fill, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def build(
    task: str,
    split: str,
    text: Iterable[str],
    prompts: Sequence[Sequence[int]],
    counterfactuals: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    wrong_answers: Sequence[Sequence[int]],
    subject: Sequence[tuple[int, int]] | None = None,
    meta: dict[str, str | int] | None = None,
    continuation: Sequence[Sequence[int]] | None = None,
    cluster: Sequence[int] | None = None,
) -> Prompts:
    """Stacks N encoded prompts (BOS included); raises ValueError where a counterfactual differs in length from its
    prompt.

    Args:
        cluster: numbers of prompts that are not independent; by default each prompt is by itself.
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    if [len(ids) for ids in counterfactuals] != lengths.tolist():
        raise ValueError(f"{task}: a counterfactual has another length than its prompt")
    fill = prompts[0][0] if prompts else 0
    spans = np.array(subject or [(-1, -1)] * len(prompts), np.int32).reshape(-1, 2)  # [N, 2]
    return Prompts(
        task=task,
        split=split,
        text=list(text),
        tokens=pad(prompts, fill),
        lengths=lengths,
        counterfactual=pad(counterfactuals, fill),
        answers=pad(answers, -1),
        wrong_answers=pad(wrong_answers, -1),
        subject=spans,
        continuation=pad(continuation or [ids[:1] for ids in answers], -1),
        cluster=np.array(range(len(prompts)) if cluster is None else cluster, np.int32),
        meta=meta or {},
    )


def read_text(path: Path, key: str) -> str:
    """A UTF-8 file's text; raises UserError naming `key`, the path and why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark, if any, is not text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
