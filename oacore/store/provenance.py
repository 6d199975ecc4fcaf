"""What a file belongs to and where it comes from: the one record that every artefact carries and every reader
compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from oacore.store.layout import short_hash

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Provenance:
    """JSON-able facts about a file.

    Args:
        required: what a reader insists on, such as the model's hash and that of the prompts: another value refuses the
            file.
        noted: what is written beside it for people and for the report: settings, names, versions.
    """

    required: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    noted: Mapping[str, Any] = field(default_factory=lambda: NOTHING)

    def requiring(self, **facts: Any) -> "Provenance":
        """The same with more that readers insist on."""
        return Provenance({**self.required, **facts}, self.noted)

    def noting(self, **facts: Any) -> "Provenance":
        """The same with more that is written down."""
        return Provenance(self.required, {**self.noted, **facts})

    @property
    def facts(self) -> dict[str, Any]:
        """All that is written."""
        return {**self.noted, **self.required}

    @property
    def key(self) -> str:
        """A hash of all facts: equal exactly for work that is the same."""
        return short_hash(self.facts)
