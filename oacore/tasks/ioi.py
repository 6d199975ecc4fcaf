"""Indirect object identification (Wang et al. 2022): "Then, Mary and John went to the store. John gave a drink to" -> "
Mary".
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from oacore.errors import UserError
from oacore.tasks.prompts import Prompts, build, called, distinct, encode, following, limit, split_of, stream, words

# A and B are the two names in either order, S the one that comes again. Every slot follows a space, so every filler is
# a " word" token, and every template has every slot, so different fillings are different prompts.
TEMPLATES = (
    "Then, {A} and {B} went to the {PLACE}. {S} gave a {OBJECT} to",
    "When {A} and {B} met at the {PLACE}, {S} handed a {OBJECT} to",
    "After {A} and {B} left the {PLACE}, {S} sent a {OBJECT} to",
    "While {A} and {B} were waiting at the {PLACE}, {S} passed a {OBJECT} to",
    "Yesterday {A} and {B} walked to the {PLACE}, and {S} offered a {OBJECT} to",
    "Last week {A} and {B} worked together at the {PLACE}. In the end {S} sold a {OBJECT} to",
    "As soon as {A} and {B} reached the {PLACE}, {S} showed a {OBJECT} to",
    "One day {A} and {B} visited the {PLACE}. There {S} found a {OBJECT} and took it to",
    "In the morning {A} and {B} drove to the {PLACE}, where {S} brought a {OBJECT} to",
    "Once {A} and {B} had arrived at the {PLACE}, {S} lent a {OBJECT} to",
    "The friends {A} and {B} stayed at the {PLACE} all day. Later {S} threw a {OBJECT} to",
    "Because {A} and {B} were both at the {PLACE}, {S} decided to give a {OBJECT} to",
    "Today {A} and {B} talked for a long time at the {PLACE}. Then {S} promised a {OBJECT} to",
    "Before {A} and {B} came home from the {PLACE}, {S} mailed a {OBJECT} to",
    "It was late when {A} and {B} closed the {PLACE}. Still, {S} carried a {OBJECT} to",
    "On Sunday {A} and {B} cleaned the {PLACE}, and after that {S} returned a {OBJECT} to",
)
ORDERS = ("ABBA", "BABA")  # the indirect object is named first / second

NAMES = words(
    """
    Aaron Adam Alan Albert Alice Amanda Amy Andrea Andrew Angela Anna Anthony Arthur Barbara Benjamin Brandon Brian Carl
    Carlos Caroline Catherine Charles Charlotte Christina Christopher Claire Daniel David Dennis Diana Donald Dorothy
    Dylan Edward Eleanor Elena Elizabeth Emily Emma Eric Ethan Evan Felix Frank George Gloria Hannah Harold Heather
    Helen Henry Howard Isaac Jacob James Jane Jason Jennifer Jeremy Jessica John Jonathan Joseph Joshua Julia Justin
    Karen Katherine Kevin Kyle Laura Leonard Linda Lisa Louis Lucas Lucy Margaret Maria Martha Martin Mary Matthew Megan
    Michael Michelle Monica Nancy Nathan Nicholas Nicole Oliver Oscar Patricia Patrick Paul Peter Rachel Rebecca Richard
    Robert Roger Ruth Ryan Samuel Sandra Sarah Simon Sophia Stephen Susan Theresa Thomas Tyler Victoria Vincent Walter
    William
    """
)
PLACES = words(
    "store school park garden hospital restaurant office library beach market church museum hotel bank farm theater "
    "station airport bridge castle"
)
OBJECTS = words(
    "drink ring book computer necklace basketball snack gift letter key watch phone ticket camera hat coat map flower "
    "cake guitar"
)
NEEDED = {
    "names": 6,
    "places": 1,
    "objects": 1,
}  # 2 names for a prompt, 3 others for its counterfactual, one to vary them


def render(template: int, order: int, names: tuple[str, str, str], place: str, thing: str) -> str:
    """The prompt of a template; `names` fill the indirect object's, the subject's first and its second slot."""
    io, s1, s2 = names
    a, b = (io, s1) if ORDERS[order] == "ABBA" else (s1, io)
    return TEMPLATES[template].format(A=a, B=b, S=s2, PLACE=place, OBJECT=thing)


def sentences(rng: np.random.Generator, split: str) -> Iterator[tuple[str, str]]:
    """Endless random (prompt, answer) of one split from the full lists; prompt + answer is running text. Trains the
    demo model.
    """
    while True:
        io, s = (NAMES[i] for i in rng.choice(len(NAMES), 2, replace=False))
        place, thing = PLACES[rng.integers(len(PLACES))], OBJECTS[rng.integers(len(OBJECTS))]
        text = render(int(rng.integers(len(TEMPLATES))), int(rng.integers(len(ORDERS))), (io, s, s), place, thing)
        if split_of(text) == split:
            yield text, f" {io}"


def vocabulary() -> list[str]:
    """Every word and punctuation mark of any prompt, sorted."""
    parts = re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", " ", " ".join(TEMPLATES)))
    return sorted({*parts, *NAMES, *PLACES, *OBJECTS})


def generate(settings: Any, tokenizer: Any, seed: int, split: str, *, complete: Any = None) -> Prompts:
    """IOI prompts of one split, in ABBA and BABA order, with single-token names, places and objects.

    Counterfactual: the same sentence with three other names, all different, so it has no indirect object to find.
    Answers: the indirect object [N, 1]; wrong answers: the subject [N, 1]. `complete` is not used.
    Raises UserError where the tokenizer leaves too few fillers, lacks a word, or the split is too small.
    """
    wanted, rng = limit(settings, "ioi", split), stream(seed, split)
    fillers: dict[str, dict[str, int]] = {}
    for kind, all_words in {"names": NAMES, "places": PLACES, "objects": OBJECTS}.items():
        ids_of = {word: following(tokenizer, "and", f" {word}") for word in all_words}
        fillers[kind] = {word: ids[0] for word, ids in ids_of.items() if len(ids) == 1}
        if len(fillers[kind]) < NEEDED[kind]:
            raise UserError(
                f"tasks.ioi: {called(tokenizer)} has only {len(fillers[kind])} of {len(all_words)} {kind} as single "
                f"tokens; at least {NEEDED[kind]} are needed"
            )
    names, places, things = (list(known) for known in fillers.values())

    def pair(first: int, second: int) -> tuple[str, str]:
        return names[first], names[second + (second >= first)]  # two different names

    def text_of(template: int, order: int, first: int, second: int, place: int, thing: int) -> str:
        io, s = pair(first, second)
        return render(template, order, (io, s, s), places[place], things[thing])

    shape = (len(TEMPLATES), len(ORDERS), len(names), len(names) - 1, len(places), len(things))
    texts, counterfactuals, answers, wrong = [], [], [], []
    for (template, order, first, second, place, thing), text in distinct(rng, shape, text_of, split, wanted, "ioi"):
        io, s = pair(first, second)
        others = [name for name in names if name not in (io, s)]
        a, b, c = (others[i] for i in rng.choice(len(others), 3, replace=False))
        texts.append(text)
        counterfactuals.append(encode(tokenizer, render(template, order, (a, b, c), places[place], things[thing])))
        answers.append([fillers["names"][io]])
        wrong.append([fillers["names"][s]])
    meta: dict[str, str | int] = {f"n_{kind}": len(known) for kind, known in fillers.items()}
    return build(
        "ioi", split, texts, [encode(tokenizer, text) for text in texts], counterfactuals, answers, wrong, meta=meta
    )
