"""Pairs of prompts from a file of the user's: a clean one, a corrupt one of as many tokens, answers to the clean one.

docs/tasks.md describes the file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oacore.config.run import Config
from oacore.config.tasks import Pairs
from oacore.errors import UserError
from oacore.tasks.counts import FileSizes, counts, spoken
from oacore.tasks.files import SHOWN, bad_rows, deal, rows, subject_span
from oacore.tasks.prompts import SPLITS, Complete, Prompts, build, called, encode, following, stream, token_text
from oacore.tasks.template import SUFFIXES, template_rows

NEEDED = ("clean", "corrupt", "right")
ANSWERS = ("right", "wrong")
COLUMNS = (*NEEDED, "wrong", "split", "group", "subject")
ALLOWED = "needed are clean, corrupt, right; allowed, too, are wrong, split, group, subject"


class Pair(NamedTuple):
    """One row; texts without the blanks at their ends, "" and () where the file gives none."""

    place: str  # in the file
    clean: str
    corrupt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    split: str
    group: str
    subject: str


class Encoded(NamedTuple):
    """One row in tokens: ids with BOS, first tokens of the answers, all tokens of the first right answer, the subject's
    span.
    """

    pair: Pair
    clean: list[int]
    corrupt: list[int]
    right: list[int]
    wrong: list[int]
    continuation: list[int]
    span: tuple[int, int]

    @property
    def is_aligned(self) -> bool:
        """Whether both prompts have as many tokens, so that activations can be exchanged position by position."""
        return len(self.clean) == len(self.corrupt)


# The file


def read_pairs(path: Path, key: str) -> list[Pair]:
    """All rows of a file.

    Raises:
        UserError: naming `key`, for a file that can't be read, has no rows, lacks a column or has bad rows, of which up
            to ten are listed.
    """
    is_csv = path.suffix.lower() == ".csv"
    pairs, bad, first = list[Pair](), list[str](), dict[tuple[str, str], str]()
    is_template = path.suffix.lower() in SUFFIXES
    for place, row in template_rows(path, key) if is_template else rows(path, key):
        cells = _cells(row)
        if is_csv and (missing := [name for name in NEEDED if name not in cells]):
            raise UserError(f"{key}: {path} has no column {', '.join(missing)}; {ALLOWED}")
        if problem := _malformed(row, cells):
            bad.append(f"{place}: {problem}")
            continue
        pair = _pair(place, cells, separator="|" if is_csv else None)
        before = first.setdefault((pair.clean, pair.corrupt), place)
        if problem := _problem(pair) or ("" if before == place else f"the two prompts of {before} once more"):
            bad.append(f"{place}: {problem}")
        pairs.append(pair)
    if bad := bad or _problems_of_splits(pairs):
        raise bad_rows(key, path, bad, ALLOWED)
    if not pairs:
        raise UserError(f"{key}: {path} has no rows; {ALLOWED}")
    return pairs


def _column(name: Any) -> str:
    return str(name).strip().lower()


def _cells(row: Any) -> dict[str, Any]:
    """A row's cells by column; what is missing in CSV, or null in JSON, is ""."""
    cells = row.items() if isinstance(row, dict) else ()
    return {_column(name): "" if cell is None else cell for name, cell in cells if _column(name) in COLUMNS}


def _malformed(row: Any, cells: dict[str, Any]) -> str:
    """Why cells can't be read from a row; empty if they can."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if None in row:  # where csv puts what is left over
        return "more cells than columns; a text with a comma wants quotes"
    if len(cells) < sum(_column(name) in COLUMNS for name in row):
        return "a column is given twice"
    for name, cell in cells.items():
        texts = cell if name in ANSWERS and isinstance(cell, list) else [cell]
        if any(isinstance(text, bool) or not isinstance(text, str | int | float) for text in texts):
            return f"{name} is {cell!r}; allowed: a text{' or a list of texts' if name in ANSWERS else ''}"
    return ""


def _pair(place: str, cells: dict[str, Any], separator: str | None) -> Pair:
    one = {name: str(cells.get(name, "")).strip() for name in COLUMNS if name not in ANSWERS}
    right, wrong = (_texts(cells.get(name, ""), separator) for name in ANSWERS)
    return Pair(place=place, right=right, wrong=wrong, **one)


def _texts(cell: Any, separator: str | None) -> tuple[str, ...]:
    """The answers of a cell."""
    parts = cell if isinstance(cell, list) else str(cell).split(separator) if separator else [cell]
    return tuple(text for part in parts if (text := str(part).strip()))


def _problem(pair: Pair) -> str:
    """What is missing in a row, or does not go together; empty if nothing."""
    if missing := [name for name in NEEDED if not getattr(pair, name)]:
        return f"no {', '.join(missing)}"
    if pair.clean == pair.corrupt:
        return "clean and corrupt are the same"
    if both := set(pair.right) & set(pair.wrong):
        return f"'{min(both)}' is right and wrong"
    if pair.split and pair.split not in SPLITS:
        return f"split is '{pair.split}'; allowed: {', '.join(SPLITS)}"
    if pair.subject not in pair.clean:
        return f"the clean prompt '{pair.clean}' does not contain the subject '{pair.subject}'"
    return ""


def _problems_of_splits(pairs: Sequence[Pair]) -> list[str]:
    """Rows without a split where others have one, and clean prompts that are in two."""
    if not any(pair.split for pair in pairs):
        return []
    bad, first = [], dict[str, Pair]()
    for pair in pairs:
        before = first.setdefault(pair.clean, pair)
        if not pair.split:
            bad.append(f"{pair.place}: no split, which other rows have; allowed: one for every row, or for none")
        elif pair.split != before.split:
            bad.append(f"{pair.place}: its clean prompt is in {before.split}, too, at {before.place}")
    return bad


# Splits


def clusters(pairs: Sequence[Pair]) -> list[int]:
    """[N] The same number for rows that are not independent: of one group or one clean prompt, or linked by such
    rows.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            name = above
        return name

    for pair in pairs:
        if pair.group:
            parent[root(f"clean {pair.clean}")] = root(f"group {pair.group}")
    roots = [root(f"clean {pair.clean}") for pair in pairs]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(roots))}
    return [number_of[name] for name in roots]


def split_pairs(pairs: Sequence[Pair], seed: int) -> list[str]:
    """The split of each row: as the file says, else 60/20/20 of the clusters, no cluster in two splits."""
    if pairs[0].split:
        return [pair.split for pair in pairs]
    of_cluster = deal(dict.fromkeys(cluster := clusters(pairs), ()), seed)
    return [of_cluster[number] for number in cluster]


def _counts(settings: Pairs, task: str, split_of: Sequence[str]) -> dict[str, int]:
    return counts(settings, f"tasks.{task}", f"{settings.pairs}", split_of, "rows")


def check(config: Config, task: str) -> None:
    """Read all that can be wrong with a task's file without a tokenizer.

    Raises:
        UserError: bad rows; rows that the settings ask for and the file has not; rows without wrong answers where
            circuits compare with these, or without a subject where it is traced.
    """
    settings = config.tasks.selected()[task]
    assert isinstance(settings, Pairs)
    pairs = read_pairs(settings.pairs, f"tasks.{task}.pairs")
    _counts(settings, task, split_pairs(pairs, config.seed))
    without = [pair.place for pair in pairs if not pair.wrong]
    if without and task in config.circuit_tasks() and (comparing := config.comparing_answers()):
        raise UserError(
            f"{comparing[0]}; {settings.pairs} (tasks.{task}.pairs) has {len(without)} rows without wrong answers: "
            f"{', '.join(without[:SHOWN])}; allowed: wrong answers in every row, other circuits.tasks, or leave it out"
        )
    unnamed = [pair.place for pair in pairs if not pair.subject]
    if unnamed and task in config.tracing_tasks():
        raise UserError(
            f"tracing.tasks: {task}: {settings.pairs} (tasks.{task}.pairs) has {len(unnamed)} rows without a subject: "
            f"{', '.join(unnamed[:SHOWN])}; allowed: a subject in every row, or other tracing.tasks"
        )


def sizes(settings: Pairs, task: str, seed: int) -> FileSizes:
    """What there will be, as far as can be seen without a tokenizer; raises UserError for a bad file, as `check`."""
    pairs = read_pairs(settings.pairs, f"tasks.{task}.pairs")
    longest = max(spoken(pair.clean) for pair in pairs)
    n_train, n_validation, n_test = _counts(settings, task, split_pairs(pairs, seed)).values()
    return FileSizes(n_train, n_validation, n_test, 1 + longest)


# Tokens


def encode_pair(tokenizer: Any, pair: Pair) -> Encoded:
    """Tokens of a row; an answer stands one space after the clean prompt.

    Raises:
        UserError: a word that the tokenizer does not know, or a right and a wrong answer that begin with one token.
    """
    clean, corrupt = encode(tokenizer, pair.clean), encode(tokenizer, pair.corrupt)
    right, wrong = ([_answer(tokenizer, pair.clean, text) for text in texts] for texts in (pair.right, pair.wrong))
    firsts, wrong_firsts = (list(dict.fromkeys(ids[0] for ids in answers)) for answers in (right, wrong))
    if both := set(firsts) & set(wrong_firsts):
        raise UserError(f"a right and a wrong answer begin with the same token '{token_text(tokenizer, min(both))}'")
    span = subject_span(tokenizer, pair.clean, pair.subject) if pair.subject else (-1, -1)
    return Encoded(pair, clean, corrupt, firsts, wrong_firsts, right[0], span)


def _answer(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    ids = following(tokenizer, prompt, f" {answer}")
    if not ids:
        raise UserError(f"the tokenizer has no token for the answer '{answer}' after '{prompt}'")
    return ids


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], path: Path, key: str, align: str) -> list[Encoded]:
    """Tokens of all rows.

    Raises:
        UserError: rows that the tokenizer can't do, or, unless `align` is "drop", whose prompts differ in length; up to
            ten are listed.
    """
    encoded, bad = list[Encoded](), list[str]()
    for pair in pairs:
        try:
            encoded.append(encode_pair(tokenizer, pair))
        except UserError as error:
            bad.append(f"{pair.place}: {error}")
    if bad:
        raise bad_rows(key, path, bad, f"for {called(tokenizer)}")
    uneven = [
        f"{row.pair.place}: clean {len(row.clean) - 1}, corrupt {len(row.corrupt) - 1}"
        for row in encoded
        if not row.is_aligned
    ]
    if uneven and align == "refuse":
        raise bad_rows(key, path, uneven, "allowed: as many tokens in clean as in corrupt, or align: drop")
    return encoded


def generate(
    settings: Pairs, tokenizer: Any, seed: int, split: str, *, task: str, complete: Complete | None = None
) -> Prompts:
    """Rows of one split of `settings.pairs`, in the file's order; fewer than all are drawn with the seed.

    Counterfactual: the corrupt prompt. Answers [N, A], wrong answers [N, W]: first tokens of " " + answer. Standard
    errors are over groups. meta: n_rows of the split in the file, of which n_unaligned are left out. `complete` is not
    used.

    Raises:
        UserError: bad rows of any split, and what the file can't give of all splits.
    """
    path, key = settings.pairs, f"tasks.{task}.pairs"
    pairs = read_pairs(path, key)
    encoded = encode_pairs(tokenizer, pairs, path, key, settings.align)
    split_of, cluster = split_pairs(pairs, seed), clusters(pairs)
    aligned = [i for i, row in enumerate(encoded) if row.is_aligned]
    n = _counts(settings, task, [split_of[i] for i in aligned])[split]
    usable = [i for i in aligned if split_of[i] == split]
    chosen = [usable[k] for k in sorted(stream(seed, split).permutation(len(usable))[:n])]
    found = [encoded[i] for i in chosen]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(cluster[i] for i in chosen))}
    n_rows = split_of.count(split)
    return build(
        task,
        split,
        [row.pair.clean for row in found],
        [row.clean for row in found],
        [row.corrupt for row in found],
        [row.right for row in found],
        [row.wrong for row in found],
        [row.span for row in found],
        {"n_rows": n_rows, "n_unaligned": n_rows - len(usable)},
        [row.continuation for row in found],
        [number_of[cluster[i]] for i in chosen],
    )
