"""Rows of prompt pairs from wordings with slots, and lists of the words that may stand there: what a CSV file of pairs
would list. docs/tasks.md describes the file.
"""

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from oacore.config.base import Settings
from oacore.config.yaml_file import read_yaml
from oacore.errors import UserError

SUFFIXES = (".yaml", ".yml")
LISTED = 100_000  # choices of words up to which each is drawn once
TRIES = 200  # draws for each row that is wanted, where there are more; so many repeat what came before


def _texts(value: Any) -> Any:
    """One text, or a list of them, as a list; 1987 is a text as well."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in values]
    return texts if all(isinstance(item, str) for item in texts) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class Template(Settings):
    """The file; every text may have slots such as {name}."""

    n: int = Field(ge=2, description="how many rows to draw")
    seed: int = Field(0, ge=0, description="seed of the draw")
    clean: Texts = Field(min_length=1, description="the prompt, in one wording or several")
    corrupt: Texts = Field(min_length=1, description="the counterfactual prompt, one for each wording")
    right: Texts = Field(min_length=1, description="right answers")
    wrong: Texts = Field((), description="wrong answers")
    group: str = Field("", description="what rows that are not independent have in common")
    subject: str = Field("", description="part of the clean prompt that causal tracing replaces")
    words: dict[str, Texts] = Field(
        min_length=1, description="the words of each slot; slots with commas between them share theirs, no word twice"
    )

    @property
    def slots(self) -> dict[str, tuple[str, ...]]:
        """The words of every slot by its name."""
        return {name.strip(): words for names, words in self.words.items() for name in names.split(",")}

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text with the key that it is at."""
        for key in ("clean", "corrupt", "right", "wrong"):
            yield from ((key, text) for text in getattr(self, key))
        yield from (("group", self.group), ("subject", self.subject))

    @model_validator(mode="after")
    def _slots_have_words(self) -> "Template":
        if len(self.clean) != len(self.corrupt):
            raise ValueError(f"corrupt: {len(self.corrupt)} wordings; allowed: {len(self.clean)}, as clean has")
        slots, used = self.slots, set[str]()
        for key, text in self.texts():
            of_text = _slots_in(key, text)
            if unknown := sorted(of_text - slots.keys()):
                raise ValueError(f"{key}: {{{unknown[0]}}} in {text!r}; allowed: {', '.join(slots)}, as in words")
            used |= of_text
        if idle := [name for name in slots if name not in used]:
            raise ValueError(f"words: {', '.join(idle)}; allowed: slots that a text has")
        for names, words in self.words.items():
            if len(words) < names.count(",") + 1 or len(set(words)) < len(words):
                raise ValueError(
                    f"words: {names}: {len(words)} words, {len(set(words))} different; allowed: different ones, as "
                    "many as slots share them"
                )
        return self


def _slots_in(key: str, text: str) -> set[str]:
    """Names of the slots in a text; raises ValueError where braces do not fit."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{key}: {text!r}: {error}; allowed: slots such as {{name}}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ValueError(f"{key}: {text!r}: {{{name}}}; allowed: a name in braces")
    return {name for _, name, _, _ in parts if name is not None}


def template_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row that a template gives, as `oacore.tasks.files.rows` has those of a file.

    Every wording and choice of words is as likely as any other; no row comes twice, and more rows begin with those of
    fewer.

    Raises:
        UserError: naming `key`, for a file that is no template, or gives fewer rows than it asks for.
    """
    try:
        template = Template.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [_problem(detail) for detail in error.errors()]
        raise UserError(f"{key}: {path}: {'; '.join(lines)}") from None
    seen = set[str]()
    for wording, words in _choices(template):
        if len(seen) == template.n:
            return
        row: dict[str, Any] = {
            name: [text.format(**words) for text in getattr(template, name)] for name in ("right", "wrong")
        }
        row |= {name: getattr(template, name).format(**words) for name in ("group", "subject")}
        row |= {name: getattr(template, name)[wording].format(**words) for name in ("clean", "corrupt")}
        if (text := json.dumps(row)) not in seen:
            seen.add(text)
            yield f"row {len(seen)}", row
    if len(seen) < template.n:
        raise UserError(f"{key}: {path}: n: {template.n}; allowed: up to {len(seen)}, all that its words give")


def _problem(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    allowed = f" (allowed: {', '.join(Template.model_fields)})" if detail["type"] == "extra_forbidden" else ""
    message = str(detail.get("ctx", {}).get("error", detail["msg"]))
    return f"{place}: {message}{allowed}" if place else message


def _choices(template: Template) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of a wording and a word for every slot, at random, whatever number of rows is wanted."""
    slots, rng = template.slots, np.random.default_rng(template.seed)
    shape = (len(template.clean), *map(len, slots.values()))
    few = prod(shape) <= LISTED
    drawn = rng.permutation(prod(shape)) if few else range(TRIES * template.n)
    for number in drawn:
        cell = np.unravel_index(number, shape) if few else [rng.integers(size) for size in shape]
        words = {name: of_slot[int(i)] for (name, of_slot), i in zip(slots.items(), cell[1:], strict=True)}
        if all(_differ(words, names) for names in template.words):
            yield int(cell[0]), words


def _differ(words: dict[str, str], names: str) -> bool:
    """Whether slots that share their words have different ones."""
    own: Sequence[str] = [words[name.strip()] for name in names.split(",")]
    return len(set(own)) == len(own)
