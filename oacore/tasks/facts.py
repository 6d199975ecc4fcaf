"""Facts for causal tracing: "The Eiffel Tower is in the city of" -> " Paris", with the subject's token span.

Three layouts are read: CSV with a header, JSON lines, and ROME's known_1000 (a JSON list). Columns: subject, prompt
(contains the subject), answer (or attribute, or object) and, optionally, relation (or relation_id); others are ignored.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oacore.config.run import Config
from oacore.config.tasks import Facts
from oacore.errors import UserError
from oacore.tasks.files import bad_rows, deal, rows, subject_span
from oacore.tasks.prompts import SPLITS, Complete, Prompts, build, encode, following, limit, pad, stream

KEY = "tasks.facts.path"
ALIASES = {
    "subject": ("subject",),
    "prompt": ("prompt",),
    "answer": ("answer", "attribute", "object"),
    "relation": ("relation", "relation_id"),
}


class Fact(NamedTuple):
    """One row; relation is "" where the file gives none."""

    subject: str
    prompt: str
    answer: str
    relation: str


class Encoded(NamedTuple):
    """One fact in tokens: ids with BOS, the subject's half-open span of positions, the ids of the whole answer."""

    fact: Fact
    ids: list[int]
    span: tuple[int, int]
    answer: list[int]


def read_facts_file(path: Path) -> list[Fact]:
    """The facts of a file, the first of those with the same prompt; raises UserError listing up to ten bad rows."""
    facts: dict[str, Fact] = {}
    bad = []
    for place, row in rows(path, KEY):
        if not isinstance(row, dict):
            bad.append(f"{place}: not a JSON object")
            continue
        given = {
            key: [row[alias] for alias in aliases if row.get(alias) is not None] for key, aliases in ALIASES.items()
        }
        values = {key: str(value[0]).strip() if value else "" for key, value in given.items()}
        fact = Fact(**values)
        missing = [name for name in ("subject", "prompt", "answer") if not values[name]]
        if missing:
            bad.append(f"{place}: no {', '.join(missing)}")
        elif fact.subject not in fact.prompt:
            bad.append(f"{place}: the prompt '{fact.prompt}' does not contain the subject '{fact.subject}'")
        else:
            facts.setdefault(fact.prompt, fact)
    if bad:
        raise bad_rows(KEY, path, bad, "needed are subject, prompt, answer")
    return list(facts.values())


def check(config: Config, task: str) -> None:
    """UserError for a file of the user's with bad rows."""
    facts = config.tasks.selected()[task]
    assert isinstance(facts, Facts)
    if facts.path is not None:
        read_facts_file(facts.path)


def split_facts(facts: list[Fact], seed: int, unseen: str) -> list[str]:
    """The split of each fact: 60/20/20 of the subjects, no subject in two splits, and every relation in each as far as
    it goes.

    With `unseen` "subjects_and_relations" the relations are dealt out too, and facts whose subject and relation fell
    into different splits belong to none: "".
    Raises UserError where relations are asked for and there are fewer than 3.
    """
    relations: dict[str, set[str]] = {}
    for fact in facts:
        relations.setdefault(fact.subject, set()).add(fact.relation)
    of_subject = deal({subject: tuple(sorted(names)) for subject, names in relations.items()}, seed)
    if unseen == "subjects":
        return [of_subject[fact.subject] for fact in facts]
    names = {fact.relation for fact in facts}
    if len(names) < len(SPLITS) or "" in names:
        raise UserError(
            f"tasks.facts.unseen: 'subjects_and_relations', but the file has {len(names - {''})} "
            f"relations{' and facts without one' if '' in names else ''}; allowed: subjects, or at least {len(SPLITS)} "
            "relations, one for each fact"
        )
    of_relation = deal(dict.fromkeys(sorted(names), ()), seed)
    return [split if (split := of_subject[fact.subject]) == of_relation[fact.relation] else "" for fact in facts]


def encode_fact(tokenizer: Any, fact: Fact) -> Encoded:
    """Tokens of a fact."""
    ids = encode(tokenizer, fact.prompt)
    answer = following(tokenizer, fact.prompt, f" {fact.answer}")
    if not answer:
        raise UserError(
            f"{KEY}: the tokenizer has no token for the answer '{fact.answer}' after '{fact.prompt}'; every word must "
            "be known"
        )
    return Encoded(fact, ids, subject_span(tokenizer, fact.prompt, fact.subject), answer)


def find_counterfactual(tokenizer: Any, encoded: Encoded, others: list[Encoded]) -> tuple[list[int], Encoded] | None:
    """The first of `others` (best first) whose subject keeps the prompt's token length, with the ids of the prompt
    about it.
    """
    for other in others:
        if other.fact.subject != encoded.fact.subject:
            ids = encode(tokenizer, encoded.fact.prompt.replace(encoded.fact.subject, other.fact.subject))
            if len(ids) == len(encoded.ids):
                return ids, other
    return None


def generate(settings: Any, tokenizer: Any, seed: int, split: str, *, complete: Complete | None = None) -> Prompts:
    """Facts of one split of `settings.path`, at most `settings.n_<split>` of them (None: all).

    Counterfactual: the same prompt about another subject of the split with as many tokens, of the same relation and
    with another answer where there is one. Answers [N, 1]: first token of " " + answer; wrong answers [N, 1]: that of
    the other subject where it has the same relation and another answer, else -1. With `complete`, only facts whose
    predicted token is the answer are kept. Splits are by subject and depend on the seed (`split_facts`). meta: n_rows
    (facts of the split in the file) = n_wrong (the model's answer is another) + n_no_counterfactual + n_usable;
    n_straddling of the file belong to no split. Raises UserError for an unreadable file, bad rows, unknown words, and
    fewer than 2 usable facts.
    """
    most, rng = limit(settings, "facts", split), stream(seed, split)
    path = Path(settings.path)
    facts = read_facts_file(path)
    split_of = split_facts(facts, seed, settings.unseen)
    of_split = [encode_fact(tokenizer, fact) for fact, its in zip(facts, split_of, strict=True) if its == split]
    known = [of_split[i] for i in rng.permutation(len(of_split))]
    if complete is not None and known:
        fill = known[0].ids[0]
        lengths = np.array([len(encoded.ids) for encoded in known], np.int32)
        predicted = complete(pad([encoded.ids for encoded in known], fill), lengths)
        known = [encoded for encoded, id_ in zip(known, predicted, strict=True) if encoded.answer[0] == id_]

    def contrasts(encoded: Encoded, other: Encoded) -> bool:
        return encoded.fact.relation == other.fact.relation != "" and encoded.answer[0] != other.answer[0]

    usable, counterfactuals, wrong = [], [], []
    for encoded in known:
        shuffled = [known[i] for i in rng.permutation(len(known))]
        best_first = [o for o in shuffled if contrasts(encoded, o)] + [o for o in shuffled if not contrasts(encoded, o)]
        contrast = find_counterfactual(tokenizer, encoded, best_first)
        if contrast is not None:
            usable.append(encoded)
            counterfactuals.append(contrast[0])
            wrong.append([contrast[1].answer[0] if contrasts(encoded, contrast[1]) else -1])
    meta: dict[str, str | int] = {
        "n_rows": len(of_split),
        "n_wrong": len(of_split) - len(known),
        "n_no_counterfactual": len(known) - len(usable),
        "n_usable": len(usable),
        "n_straddling": split_of.count(""),
    }
    if len(usable) < 2:
        counts = ", ".join(f"{key} {value}" for key, value in meta.items())
        raise UserError(
            f"{KEY}: {path} gives {len(usable)} usable facts in the {split} split ({counts}); at least 2 are needed"
        )
    usable, counterfactuals, wrong = usable[:most], counterfactuals[:most], wrong[:most]
    texts, ids = [encoded.fact.prompt for encoded in usable], [encoded.ids for encoded in usable]
    spans = [encoded.span for encoded in usable]
    answers = [encoded.answer for encoded in usable]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(known.fact.subject for known in usable))}
    subjects = [number_of[encoded.fact.subject] for encoded in usable]
    firsts = [ids[:1] for ids in answers]
    return build("facts", split, texts, ids, counterfactuals, firsts, wrong, spans, meta, answers, subjects)
