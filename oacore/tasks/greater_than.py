"""Greater-Than (Hanna et al. 2023): "The war lasted from the year 1743 to the year 17" -> any two-digit token above
43.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from oacore.errors import UserError
from oacore.tasks.prompts import Prompts, build, called, distinct, encode, following, limit, split_of, stream, words

NOUNS = words(
    """
    war siege reign plague drought famine campaign revolt rebellion strike contract treaty alliance truce expedition
    voyage journey mission crusade dynasty empire kingdom occupation exile trial dispute conflict struggle feud project
    program plan construction study experiment tour festival boycott ban embargo blockade raid invasion migration
    epidemic boom depression recession
    """
)
CENTURIES = range(10, 19)  # years 1000 to 1899
STARTS = range(2, 99)  # above the counterfactual's 01, and below 99 so that an answer exists


def render(noun: str, century: int, start: int) -> str:
    """The prompt of a noun and a start year."""
    return f"The {noun} lasted from the year {century}{start:02} to the year {century}"


def sentences(rng: np.random.Generator, split: str) -> Iterator[tuple[str, str]]:
    """Endless random (prompt, answer) of one split, end years uniform above the start; prompt + answer is running text.

    Trains the demo model.
    """
    while True:
        start = int(rng.integers(STARTS.start, STARTS.stop))
        text = render(NOUNS[rng.integers(len(NOUNS))], CENTURIES[rng.integers(len(CENTURIES))], start)
        if split_of(text) == split:
            yield text, f"{rng.integers(start + 1, 100):02}"


def vocabulary() -> list[str]:
    """Every word of any prompt or answer, years as two-digit halves, sorted."""
    return sorted({*words("The lasted from the year to"), *NOUNS, *(f"{number:02}" for number in range(100))})


def year_tokens(tokenizer: Any) -> dict[int, dict[int, int]]:
    """Per century, the ids of the last two digits of the years that split in exactly two tokens, " 17" and "43".

    Only centuries whose year 01 (the counterfactual) splits so.
    """
    table: dict[int, dict[int, int]] = {}
    for century in CENTURIES:
        first = following(tokenizer, "year", f" {century}")
        split = {year: following(tokenizer, "year", f" {century}{year:02}") for year in range(100)}
        known = {year: ids[1] for year, ids in split.items() if len(ids) == 2 and ids[:1] == first}
        if 1 in known:
            table[century] = known
    return table


def generate(settings: Any, tokenizer: Any, seed: int, split: str, *, complete: Any = None) -> Prompts:
    """Greater-Than prompts of one split, over nouns and start years that the tokenizer splits in two.

    Counterfactual: the start year's last digits become 01. Answers [N, A]: ids of all later two-digit ends that the
    tokenizer gives in that century; wrong answers [N, W]: ids of all others. `complete` is not used.
    Raises UserError where no year splits so, the tokenizer lacks a word, or the split is too small.
    """
    wanted, rng, table = limit(settings, "greater_than", split), stream(seed, split), year_tokens(tokenizer)
    starts = [
        (century, year) for century, known in table.items() for year in STARTS if year in known and year < max(known)
    ]
    if not starts:
        raise UserError(
            f"tasks.greater_than: {called(tokenizer)} splits no year of 1000-1899 in two tokens like ' 17' and '43' "
            f"(' 1743' has {len(following(tokenizer, 'year', ' 1743'))} known tokens); exactly two are needed"
        )
    cells = distinct(
        rng, (len(NOUNS), len(starts)), lambda noun, i: render(NOUNS[noun], *starts[i]), split, wanted, "greater_than"
    )
    counterfactuals, answers, wrong = [], [], []
    for (noun, i), _ in cells:
        century, start = starts[i]
        counterfactuals.append(encode(tokenizer, render(NOUNS[noun], century, 1)))
        answers.append([id_ for year, id_ in table[century].items() if year > start])
        wrong.append([id_ for year, id_ in table[century].items() if year <= start])
    texts = [text for _, text in cells]
    prompts = [encode(tokenizer, text) for text in texts]
    return build("greater_than", split, texts, prompts, counterfactuals, answers, wrong, meta={"n_years": len(starts)})
