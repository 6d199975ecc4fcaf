"""Few-shot prompts from a labelled data set, with true or with permuted labels ("Overthinking the truth", Halawi et al.
2023).

A demonstration is a text with a label; a prompt is some demonstrations and a text whose label is to be predicted.
Permuted labels are wrong in the same way in every demonstration: each label stands for another.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from oacore.errors import UserError
from oacore.store.artefacts import digest_of_tensors
from oacore.tasks.prompts import Ints, encode, following, pad, read_text

KEY = "lenses.truthfulness.datasets"


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True, eq=False)
class FewShot:
    """Prompts that end right before a label."""

    tokens: Ints  # [N, T], padded on the right
    lengths: Ints  # [N]
    label: Ints  # [N], index of the true label
    label_tokens: Ints  # [K], first token of each label where a prompt ends
    labels: tuple[str, ...]  # K of them

    def digest(self) -> str:
        """sha256 of all arrays."""
        names = ("tokens", "lengths", "label", "label_tokens")
        return digest_of_tensors({name: torch.from_numpy(getattr(self, name)) for name in names})


def read_examples(path: Path) -> list[Example]:
    """The examples of a CSV file with columns text, label, or of JSON lines with these keys.

    Raises:
        UserError: bad rows, up to ten of them with their line numbers; fewer than 2 labels, or a label with one
            example.
    """
    examples, bad = [], []
    for number, row in _rows(path):
        values = {key: str(row.get(key) or "").strip() for key in Example._fields} if isinstance(row, dict) else {}
        if not values:
            bad.append(f"line {number}: not a JSON object")
        elif missing := [key for key, value in values.items() if not value]:
            bad.append(f"line {number}: no {', '.join(missing)}")
        else:
            examples.append(Example(**values))
    if bad:
        raise UserError(f"{KEY}: {path} has {len(bad)} bad rows (needed are text, label): {'; '.join(bad[:10])}")
    counts = {
        label: sum(example.label == label for example in examples)
        for label in dict.fromkeys(example.label for example in examples)
    }
    if len(counts) < 2 or min(counts.values()) < 2:
        shown = ", ".join(f"{label!r} {count}" for label, count in counts.items()) or "none"
        raise UserError(
            f"{KEY}: {path} has the labels {shown}; allowed: at least 2 labels, each with at least 2 examples"
        )
    return examples


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(path, KEY)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise UserError(f"{KEY}: {path} is not CSV: line {reader.line_num}: {error}") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def few_shot(
    examples: list[Example],
    tokenizer: Any,
    *,
    n_demonstrations: int,
    n_inputs: int,
    permuted: bool,
    seed: int,
    max_length: int,
    template: str = "{text} {label}",
    separator: str = "\n",
) -> FewShot:
    """Prompts for `n_inputs` inputs, or all there are; with and without permutation they are the same but for the
    labels shown.

    Args:
        max_length: tokens of the longest prompt allowed, BOS included.
        template: one demonstration; ends in {label}.

    Raises:
        UserError: too few examples or too long prompts, or labels that begin with the same token.
    """
    labels = tuple(sorted({example.label for example in examples}))
    if len(examples) <= n_demonstrations:
        raise UserError(
            f"lenses.truthfulness.n_demonstrations: {n_demonstrations}; allowed: fewer than the data set's "
            f"{len(examples)} examples"
        )
    rng = np.random.default_rng(seed)
    shift = int(rng.integers(1, len(labels)))
    shown_as = {label: labels[(i + shift * permuted) % len(labels)] for i, label in enumerate(labels)}
    inputs = rng.permutation(len(examples))[:n_inputs]
    before_label = template.removesuffix("{label}")
    texts = []
    for number in inputs.tolist():
        chosen = _demonstrations(examples, number, n_demonstrations, rng)
        lines = [template.format(text=examples[i].text, label=shown_as[examples[i].label]) for i in chosen]
        texts.append(separator.join([*lines, before_label.format(text=examples[number].text)]))
    label_tokens = _label_tokens(tokenizer, labels, texts[0].rstrip())
    # A label brings its own space along, so prompts end without one.
    rows = [encode(tokenizer, text.rstrip()) for text in texts]
    longest = max(map(len, rows))
    if longest > max_length:
        fit = int(n_demonstrations * max_length / longest)
        raise UserError(
            f"lenses.truthfulness.n_demonstrations: {n_demonstrations} make a prompt {longest} tokens long; allowed: "
            f"{max_length}, the model's context, so about {fit}"
        )
    truth = np.array([labels.index(examples[number].label) for number in inputs], np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    return FewShot(pad(rows, rows[0][0]), lengths, truth, np.array(label_tokens, np.int32), labels)


def _label_tokens(tokenizer: Any, labels: Sequence[str], before: str) -> list[int]:
    """The first token of each label after a prompt; UserError for one that has none, or two that begin alike."""
    first_ids = [following(tokenizer, before, f" {label}") for label in labels]
    if missing := [label for label, ids in zip(labels, first_ids, strict=True) if not ids]:
        raise UserError(f"{KEY}: the tokenizer has no token for the label {missing[0]!r} where a prompt ends")
    label_tokens = [ids[0] for ids in first_ids]
    for i, token in enumerate(label_tokens):
        if token in label_tokens[:i]:
            same = labels[label_tokens.index(token)]
            raise UserError(
                f"{KEY}: the labels {same!r} and {labels[i]!r} begin with the same token; allowed: labels that differ "
                "in it"
            )
    return label_tokens


def _demonstrations(examples: list[Example], number: int, n: int, rng: np.random.Generator) -> list[int]:
    """n examples in random order, none of the input's text, each label as often as any other as far as there are
    examples.
    """
    order = [int(i) for i in rng.permutation(len(examples)) if examples[i].text != examples[number].text]
    seen: dict[str, int] = {}
    rank = []
    for i in order:
        seen[examples[i].label] = seen.get(examples[i].label, 0) + 1
        rank.append(seen[examples[i].label])
    chosen = [order[j] for j in sorted(range(len(order)), key=rank.__getitem__)[:n]]
    return [chosen[j] for j in rng.permutation(len(chosen))]
