"""Registry rows: one row says all that is to be known of a task, an ablation type, a circuit method, a corruption or a
lens.

Rules, estimates, figures, reports and docs read the rows; what a row's name stands for is computed by one function or
class, which the row names as `package.module:name`, so that a config can be read without torch. Adding one is one file
with that function, and one row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar


class Look(NamedTuple):
    """How a name is drawn in every figure: told apart by shape where the colours are not."""

    color: str
    marker: str


@dataclass(frozen=True)
class Row:
    """What all rows have.

    Args:
        name: as the config, tables and files call it.
        code: `package.module:name` of what computes it; the module's hash is part of what its stages depend on.
        note: one sentence for the report and the docs.
    """

    name: str
    code: str
    note: str

    @property
    def module(self) -> str:
        """The module that computes it, for code hashes."""
        return self.code.partition(":")[0]

    def load(self) -> Any:
        """The function or class that computes it; imports its module, and with it torch."""
        return resolve(self.code)


def resolve(code: str) -> Any:
    """What `package.module:name` names; imports the module."""
    module, _, name = code.partition(":")
    return getattr(import_module(module), name)


AnyRow = TypeVar("AnyRow", bound=Row)


def registry(rows: Iterable[AnyRow]) -> Mapping[str, AnyRow]:
    """Rows by name, in the order in which figures, tables and reports show them.

    Raises:
        ValueError: two rows of one name.
    """
    rows = tuple(rows)
    by_name = {row.name: row for row in rows}
    if len(by_name) < len(rows):
        raise ValueError(f"registry: {', '.join(row.name for row in rows)}; allowed: one row for each name")
    return MappingProxyType(by_name)


SHOWN = (
    "note",
    "look",
    "color",
    "highlighted",
)  # what figures and texts show of a row; all else decides what is computed


def shown(rows: Mapping[str, Row], names: Iterable[str]) -> list[dict[str, Any]]:
    """What figures and texts show of these rows, JSON-able: a parameter of the rules that draw and write them."""
    return [{key: value for key, value in asdict(rows[name]).items() if key in ("name", *SHOWN)} for name in names]


def computed(rows: Mapping[str, Row], names: Iterable[str]) -> list[dict[str, Any]]:
    """What these rows decide about what is computed, JSON-able: a parameter of the rules that compute it."""
    return [{key: value for key, value in asdict(rows[name]).items() if key not in SHOWN} for name in names]
