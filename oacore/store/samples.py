"""What the numbers of a table are means of: the value of each row on each held-out prompt, in a file beside the table.

Two runs that measured the same prompts are compared by these, prompt by prompt (`oacore.compare`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oacore.store.artefacts import read_tensors, write_tensors
from oacore.store.layout import short_hash
from oacore.store.provenance import Provenance

if TYPE_CHECKING:
    from torch import Tensor

CLUSTER, MEASURED_ON = "cluster", "measured_on"


@dataclass(frozen=True)
class Samples:
    """Values of a table's R rows on N held-out prompts, in the rows' order.

    Args:
        values: [R, N] by the column that has their means.
        cluster: [N], the same number for prompts that may depend on each other.
        measured_on: a hash of what these prompts are: where it is equal, number n is the same prompt.
    """

    values: Mapping[str, "Tensor"]
    cluster: np.ndarray
    measured_on: str


def write_samples(
    path: str | Path,
    values: Mapping[str, "Tensor"],
    cluster: np.ndarray,
    measured_on: Mapping[str, Any],
    provenance: Provenance,
) -> None:
    """Write the samples of a table.

    Args:
        values: [R, N] by column.
        cluster: [N].
        measured_on: JSON-able, what determines which prompts these are, and in which order.
    """
    import torch

    tensors = {**values, CLUSTER: torch.from_numpy(np.asarray(cluster, np.int64))}
    write_tensors(path, tensors, provenance.noting(**{MEASURED_ON: short_hash(measured_on)}))


def read_samples(path: str | Path) -> Samples:
    """The samples that `write_samples` wrote. Raises UserError as `read_tensors` does."""
    facts, tensors = read_tensors(path)
    cluster = tensors.pop(CLUSTER).numpy()
    return Samples(tensors, cluster, facts[MEASURED_ON])
